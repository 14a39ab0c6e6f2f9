//! Speed and memory against autoregressive decoding.

use std::collections::HashMap;

use cllm_core::decode::Strategy;

use super::document::{ModelResults, StrategyResults, Throughput};
use crate::records::{Records, SpeedRecord};
use crate::role::Role;
use crate::speedup;
use crate::statistics::ratio;

/// Adds the ratios to every strategy.
pub(super) fn add(models: &mut [ModelResults], records: &Records) {
    add_speedups(models);
    add_intervals(models, records);
    add_memory_ratios(models);
}

/// Tokens per second.
#[derive(Clone, Copy)]
struct Speed {
    decoding: Option<f64>,
    end_to_end: Option<f64>,
}

/// Speeds of autoregressive decoding by model and number of rows, which is `None` for the figures of
/// a strategy itself.
type Baselines = HashMap<(Role, Option<usize>), Speed>;

/// A speed-up is a ratio of tokens per second, so it does not reward a model for short answers.
fn add_speedups(models: &mut [ModelResults]) {
    let baselines = baselines(models);
    for figures in models.iter_mut().flat_map(|model| &mut model.strategies) {
        [
            figures.speedup_vs_teacher_ar,
            figures.speedup_vs_student_ar,
            figures.end_to_end_speedup_vs_teacher_ar,
            figures.end_to_end_speedup_vs_student_ar,
        ] = speedups(Speed::at_batch_1(figures), &baselines, None);
        for batch in figures.concurrency.iter_mut().flatten() {
            [
                batch.speedup_vs_teacher_ar,
                batch.speedup_vs_student_ar,
                batch.end_to_end_speedup_vs_teacher_ar,
                batch.end_to_end_speedup_vs_student_ar,
            ] = speedups(Speed::in_batch(batch), &baselines, Some(batch.concurrency));
        }
    }
}

/// Adds the intervals of the speed-ups at batch 1.
fn add_intervals(models: &mut [ModelResults], records: &Records) {
    for (role, figures) in models.iter_mut().flat_map(|model| {
        let role = model.model.role;
        model.strategies.iter_mut().map(move |figures| (role, figures))
    }) {
        let over = |baseline: Role| match (role, figures.strategy) == (baseline, Strategy::Ar) {
            true => None,
            false => speedup::interval(&pairs(records, baseline, (role, figures.strategy))),
        };
        [figures.speedup_vs_teacher_ar_ci95, figures.speedup_vs_student_ar_ci95] = Role::ALL.map(over);
    }
}

/// The timings of a model's autoregressive decoding beside those of a strategy.
fn pairs(records: &Records, baseline: Role, (role, strategy): (Role, Strategy)) -> Vec<(&SpeedRecord, &SpeedRecord)> {
    let ar: HashMap<usize, &SpeedRecord> =
        records.speeds_of(baseline, Strategy::Ar).map(|speed| (speed.index, speed)).collect();
    records.speeds_of(role, strategy).filter_map(|speed| Some((*ar.get(&speed.index)?, speed))).collect()
}

fn baselines(models: &[ModelResults]) -> Baselines {
    let mut baselines = Baselines::new();
    for (role, ar) in models.iter().filter_map(|model| Some((model.model.role, model.autoregressive()?))) {
        baselines.insert((role, None), Speed::at_batch_1(ar));
        let batches = ar.concurrency.iter().flatten();
        baselines.extend(batches.map(|batch| ((role, Some(batch.concurrency)), Speed::in_batch(batch))));
    }
    baselines
}

/// Over the teacher and over the student: of decoding, then including prefill.
fn speedups(speed: Speed, baselines: &Baselines, rows: Option<usize>) -> [Option<f64>; 4] {
    let [teacher, student] = Role::ALL.map(|role| baselines.get(&(role, rows)).copied());
    let decoding = |ar: Option<Speed>| ratio(speed.decoding, ar.and_then(|ar| ar.decoding));
    let end_to_end = |ar: Option<Speed>| ratio(speed.end_to_end, ar.and_then(|ar| ar.end_to_end));
    [decoding(teacher), decoding(student), end_to_end(teacher), end_to_end(student)]
}

impl Speed {
    fn at_batch_1(figures: &StrategyResults) -> Self {
        Speed { decoding: figures.tokens_per_second, end_to_end: figures.end_to_end_tokens_per_second }
    }

    fn in_batch(figures: &Throughput) -> Self {
        Speed { decoding: figures.tokens_per_second, end_to_end: figures.end_to_end_tokens_per_second }
    }
}

fn add_memory_ratios(models: &mut [ModelResults]) {
    let float = |bytes: Option<u64>| bytes.map(|bytes| bytes as f64);
    let of_ar = |model: &ModelResults| {
        let ar = model.autoregressive()?;
        Some((model.model.role, [float(ar.peak_memory_bytes), float(ar.speed_peak_memory_bytes)]))
    };
    let of_ar: HashMap<Role, [Option<f64>; 2]> = models.iter().filter_map(of_ar).collect();
    for model in models {
        let [batched, batch1] = of_ar.get(&model.model.autoregressive_role()).copied().unwrap_or_default();
        for figures in &mut model.strategies {
            figures.peak_memory_over_ar = ratio(float(figures.peak_memory_bytes), batched);
            figures.speed_peak_memory_over_ar = ratio(float(figures.speed_peak_memory_bytes), batch1);
        }
    }
}
