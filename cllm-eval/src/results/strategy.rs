//! Figures of a model with a strategy, from its answers and timings.

use std::collections::{BTreeMap, HashMap};

use cllm_core::decode::Strategy;
use cllm_core::statistics::median;
use cllm_core::task::{Task, Verdict};
use cllm_core::thought::Thought;
use cllm_core::trajectory::FinishReason;

use super::document::{Accuracy, AlternativeAccuracy, StrategyResults, Throughput};
use crate::acceptance::Acceptance;
use crate::records::{AnswerRecord, Records, SpeedRecord};
use crate::role::Role;
use crate::similarity::Similarity;
use crate::spider_difficulty::{Difficulty, difficulty};
use crate::statistics::{ratio, wilson};

impl StrategyResults {
    /// Computes all figures except the ratios to other strategies and models, which are `None`.
    pub(super) fn from_records(records: &Records, role: Role, strategy: Strategy) -> Self {
        let answers: Vec<&AnswerRecord> = records.answers_of(role, strategy).collect();
        let speeds: Vec<&SpeedRecord> = records.speeds_of(role, strategy).collect();
        let mut figures = Self::unmeasured(strategy);
        figures.add_scores(&answers, records.header.benchmark);
        figures.add_thoughts(&answers, records.header.settings.max_thinking_tokens.is_some());
        figures.add_tokens(&answers);
        let ar_role = records.header.autoregressive_role(role);
        figures.add_comparison_with_ar(&answers, records.answers_of(ar_role, Strategy::Ar));
        if !speeds.is_empty() {
            figures.add_speed(&speeds);
        }
        figures.concurrency = Throughput::from_records(records, role, strategy);
        figures
    }

    fn unmeasured(strategy: Strategy) -> Self {
        StrategyResults {
            name: strategy.name().to_owned(),
            label: strategy.to_string(),
            strategy,
            max_tokens_per_forward: strategy.max_window_tokens(),
            examples: 0,
            scored: 0,
            correct: 0,
            accuracy: None,
            ci95: None,
            metric: None,
            alternative: None,
            unfinished: 0,
            thoughts: None,
            open_thoughts: None,
            closed_thoughts: None,
            tokens: 0,
            forwards: 0,
            tokens_per_forward: None,
            tokens_per_forward_finished: None,
            speed_examples: 0,
            speed_tokens: None,
            speed_forwards: None,
            mean_window_tokens: None,
            speed_probes: None,
            speed_unfinished: None,
            prefill_seconds: None,
            seconds: None,
            tokens_per_second: None,
            tokens_per_second_finished: None,
            speedup_vs_teacher_ar: None,
            speedup_vs_teacher_ar_ci95: None,
            speedup_vs_student_ar: None,
            speedup_vs_student_ar_ci95: None,
            end_to_end_seconds: None,
            end_to_end_tokens_per_second: None,
            end_to_end_speedup_vs_teacher_ar: None,
            end_to_end_speedup_vs_student_ar: None,
            exact_match_vs_ar: None,
            median_logit_gap_at_difference: None,
            max_logit_gap_at_difference: None,
            batched_tokens_per_second: None,
            peak_memory_bytes: None,
            peak_memory_over_ar: None,
            speed_peak_memory_bytes: None,
            speed_peak_memory_over_ar: None,
            concurrency: None,
            acceptance: None,
            similarity: None,
            by_difficulty: None,
        }
    }

    fn add_scores(&mut self, answers: &[&AnswerRecord], benchmark: Task) {
        let verdicts = Accuracy::from_verdicts(answers.iter().map(|answer| answer.verdict));
        self.examples = answers.len();
        self.scored = verdicts.scored;
        self.correct = verdicts.correct;
        self.accuracy = verdicts.accuracy;
        self.ci95 = verdicts.ci95;
        self.alternative = AlternativeAccuracy::from_answers(answers);
        self.metric = self.alternative.as_ref().map(|alternative| alternative.metric.counterpart());
        self.unfinished = answers.iter().filter(|answer| answer.finish_reason == FinishReason::Length).count();
        self.similarity = (benchmark == Task::Codesearchnet).then(|| similarity(answers));
        self.by_difficulty = (benchmark == Task::Spider).then(|| by_difficulty(answers));
    }

    fn add_thoughts(&mut self, answers: &[&AnswerRecord], have_limit: bool) {
        let thoughts = || answers.iter().filter_map(|answer| answer.thought.as_ref());
        let is_counted = have_limit || thoughts().next().is_some();
        self.thoughts = is_counted.then(|| thoughts().count());
        self.open_thoughts = is_counted.then(|| thoughts().filter(|&thought| *thought == Thought::Open).count());
        let num_closed = || thoughts().filter(|thought| !thought.forced_tokens().is_empty()).count();
        self.closed_thoughts = have_limit.then(num_closed);
    }

    fn add_tokens(&mut self, answers: &[&AnswerRecord]) {
        let finished = || answers.iter().filter(|answer| answer.finish_reason == FinishReason::Eos);
        let finished_tokens: usize = finished().map(|answer| answer.num_decoded_tokens()).sum();
        let finished_forwards: usize = finished().map(|answer| answer.forwards).sum();
        let seconds: f64 = answers.iter().map(|answer| answer.batch_prefill_seconds + answer.batch_seconds).sum();
        self.tokens = answers.iter().map(|answer| answer.num_decoded_tokens()).sum();
        self.forwards = answers.iter().map(|answer| answer.forwards).sum();
        self.tokens_per_forward = ratio(self.tokens as f64, self.forwards as f64);
        self.tokens_per_forward_finished = ratio(finished_tokens as f64, finished_forwards as f64);
        self.batched_tokens_per_second = ratio(self.tokens as f64, seconds);
        self.peak_memory_bytes = answers.iter().filter_map(|answer| answer.peak_memory_bytes).max();
        self.acceptance = (self.strategy != Strategy::Ar).then(|| Acceptance::from_answers(answers));
    }

    fn add_comparison_with_ar<'r>(&mut self, answers: &[&AnswerRecord], ar: impl Iterator<Item = &'r AnswerRecord>) {
        // Second turns have different prompts if the answers to the first turn differ. Only answers
        // to the same prompt are compared.
        let ar: HashMap<(usize, &str), &[i32]> =
            ar.map(|answer| ((answer.index, answer.prompt.as_str()), answer.response_ids.as_slice())).collect();
        let is_equal: Vec<bool> = answers
            .iter()
            .filter_map(|answer| Some(*ar.get(&(answer.index, answer.prompt.as_str()))? == answer.response_ids))
            .collect();
        let num_equal = is_equal.iter().filter(|&&equal| equal).count();
        let gaps = || answers.iter().filter_map(|answer| answer.logit_gap_at_difference);
        self.exact_match_vs_ar = ratio(num_equal as f64, is_equal.len() as f64);
        self.median_logit_gap_at_difference = median(gaps());
        self.max_logit_gap_at_difference = gaps().max_by(f64::total_cmp);
    }

    fn add_speed(&mut self, speeds: &[&SpeedRecord]) {
        let tokens: usize = speeds.iter().map(|speed| speed.tokens).sum();
        let seconds: f64 = speeds.iter().map(|speed| speed.seconds).sum();
        let prefill_seconds: f64 = speeds.iter().map(|speed| speed.prefill_seconds).sum();
        let finished = || speeds.iter().filter(|speed| speed.finish_reason == FinishReason::Eos);
        let finished_tokens: usize = finished().map(|speed| speed.tokens).sum();
        let finished_seconds: f64 = finished().map(|speed| speed.seconds).sum();
        self.speed_examples = speeds.len();
        self.speed_tokens = Some(tokens);
        let forwards: usize = speeds.iter().map(|speed| speed.forwards).sum();
        let window_tokens: Option<u64> = speeds.iter().map(|speed| speed.window_tokens).sum();
        self.speed_forwards = Some(forwards);
        self.mean_window_tokens = window_tokens.and_then(|tokens| ratio(tokens as f64, forwards as f64));
        self.speed_probes = Some(speeds.iter().map(|speed| speed.probes).sum());
        self.speed_unfinished = Some(speeds.len() - finished().count());
        self.prefill_seconds = Some(prefill_seconds);
        self.seconds = Some(seconds);
        self.tokens_per_second = ratio(tokens as f64, seconds);
        self.tokens_per_second_finished = ratio(finished_tokens as f64, finished_seconds);
        self.end_to_end_seconds = Some(seconds + prefill_seconds);
        self.end_to_end_tokens_per_second = ratio(tokens as f64, seconds + prefill_seconds);
        self.speed_peak_memory_bytes = speeds.iter().filter_map(|speed| speed.peak_memory_bytes).max();
    }
}

fn similarity(answers: &[&AnswerRecord]) -> Similarity {
    Similarity::from_pairs(
        answers.iter().filter_map(|answer| Some((answer.text.as_str(), answer.reference.as_deref()?))),
    )
}

fn by_difficulty(answers: &[&AnswerRecord]) -> BTreeMap<Difficulty, Accuracy> {
    let mut verdicts: BTreeMap<Difficulty, Vec<Verdict>> = BTreeMap::new();
    for answer in answers.iter().filter(|answer| answer.verdict != Verdict::Unscored) {
        if let Some(reference) = &answer.reference {
            verdicts.entry(difficulty(reference)).or_default().push(answer.verdict);
        }
    }
    verdicts.into_iter().map(|(class, verdicts)| (class, Accuracy::from_verdicts(verdicts.into_iter()))).collect()
}

impl AlternativeAccuracy {
    /// `None` if no answer has a second verdict.
    fn from_answers(answers: &[&AnswerRecord]) -> Option<Self> {
        let alternatives = || answers.iter().filter_map(|answer| answer.alternative);
        let metric = alternatives().next()?.metric;
        let figures = Accuracy::from_verdicts(alternatives().map(|alternative| alternative.verdict));
        Some(AlternativeAccuracy { metric, figures })
    }
}

impl Accuracy {
    fn from_verdicts(verdicts: impl Iterator<Item = Verdict>) -> Self {
        let (mut scored, mut correct) = (0, 0);
        for verdict in verdicts {
            scored += usize::from(verdict != Verdict::Unscored);
            correct += usize::from(verdict == Verdict::Correct);
        }
        Accuracy { scored, correct, accuracy: ratio(correct as f64, scored as f64), ci95: wilson(correct, scored) }
    }
}
