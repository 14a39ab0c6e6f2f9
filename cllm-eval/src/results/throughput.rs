//! Figures of continuous batching, from the repetitions at each number of rows.

use cllm_core::decode::Strategy;
use cllm_core::trajectory::FinishReason;

use super::document::Throughput;
use crate::records::{Records, SpeedRecord, ThroughputRecord};
use crate::role::Role;
use crate::statistics::ratio;

impl Throughput {
    /// The figures of a model with a strategy, from few rows to many. `None` if none is measured.
    pub(super) fn from_records(records: &Records, role: Role, strategy: Strategy) -> Option<Vec<Self>> {
        let mut concurrency = records.header.settings.concurrency.clone();
        concurrency.sort_unstable();
        let at = |rows: usize| {
            let repetitions = match rows {
                1 => batch_1(records.speeds_of(role, strategy).collect()).into_iter().collect(),
                _ => records.throughputs_of(role, strategy).filter(|one| one.concurrency == rows).cloned().collect(),
            };
            Self::from_repetitions(repetitions)
        };
        let figures: Vec<Self> = concurrency.into_iter().filter_map(at).collect();
        (!figures.is_empty()).then_some(figures)
    }

    /// The figures of the repetition with the median speed. Speed-ups are `None`.
    fn from_repetitions(mut repetitions: Vec<ThroughputRecord>) -> Option<Self> {
        repetitions.sort_by(|a, b| (b.seconds / b.tokens as f64).total_cmp(&(a.seconds / a.tokens as f64)));
        let median = repetitions.get((repetitions.len().max(1) - 1) / 2)?;
        let tokens = median.tokens as f64;
        let end_to_end_seconds = median.prefill_seconds + median.seconds;
        let answer_end_to_end_seconds = median.answer_prefill_seconds + median.answer_seconds;
        Some(Throughput {
            concurrency: median.concurrency,
            repetitions: repetitions.len(),
            answers: median.answers,
            unfinished: median.unfinished,
            tokens: median.tokens,
            forwards: median.forwards,
            tokens_per_forward: ratio(tokens, median.forwards as f64),
            mean_rows: ratio(answer_end_to_end_seconds, end_to_end_seconds),
            prefill_seconds: median.prefill_seconds,
            seconds: median.seconds,
            tokens_per_second: ratio(tokens, median.seconds),
            tokens_per_second_per_user: ratio(tokens, median.answer_seconds),
            speedup_vs_teacher_ar: None,
            speedup_vs_student_ar: None,
            end_to_end_seconds,
            end_to_end_tokens_per_second: ratio(tokens, end_to_end_seconds),
            end_to_end_tokens_per_second_per_user: ratio(tokens, answer_end_to_end_seconds),
            end_to_end_speedup_vs_teacher_ar: None,
            end_to_end_speedup_vs_student_ar: None,
        })
    }
}

/// The timings at batch 1 as one repetition.
fn batch_1(speeds: Vec<&SpeedRecord>) -> Option<ThroughputRecord> {
    let first = speeds.first()?;
    let sum = |value: fn(&SpeedRecord) -> usize| speeds.iter().map(|speed| value(speed)).sum();
    let sum_seconds = |value: fn(&SpeedRecord) -> f64| speeds.iter().map(|speed| value(speed)).sum::<f64>();
    let (prefill_seconds, seconds) = (sum_seconds(|speed| speed.prefill_seconds), sum_seconds(|speed| speed.seconds));
    Some(ThroughputRecord {
        role: first.role,
        strategy: first.strategy,
        concurrency: 1,
        repetition: 0,
        answers: speeds.len(),
        unfinished: sum(|speed| usize::from(speed.finish_reason == FinishReason::Length)),
        tokens: sum(|speed| speed.tokens),
        forwards: sum(|speed| speed.forwards),
        prefill_seconds,
        seconds,
        answer_prefill_seconds: prefill_seconds,
        answer_seconds: seconds,
    })
}
