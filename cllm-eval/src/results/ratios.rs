//! Speed and memory against autoregressive decoding.

use super::document::ModelResults;
use crate::role::Role;
use crate::statistics::ratio;

/// Adds the ratios to every strategy.
pub(super) fn add(models: &mut [ModelResults]) {
    add_speedups(models);
    models.iter_mut().for_each(add_memory_ratios);
}

/// Tokens per second of autoregressive decoding.
#[derive(Clone, Copy)]
struct Baseline {
    decoding: f64,
    end_to_end: f64,
}

/// A speed-up is a ratio of tokens per second, so it does not reward a model for short answers.
fn add_speedups(models: &mut [ModelResults]) {
    let baseline = |role: Role| {
        let ar = models.iter().find(|results| results.model.role == role)?.autoregressive()?;
        Some(Baseline { decoding: ar.tokens_per_second?, end_to_end: ar.end_to_end_tokens_per_second? })
    };
    let (teacher, student) = (baseline(Role::Teacher), baseline(Role::Student));
    for figures in models.iter_mut().flat_map(|model| &mut model.strategies) {
        let (decoding, end_to_end) = (figures.tokens_per_second, figures.end_to_end_tokens_per_second);
        figures.speedup_vs_teacher_ar = ratio(decoding, teacher.map(|ar| ar.decoding));
        figures.speedup_vs_student_ar = ratio(decoding, student.map(|ar| ar.decoding));
        figures.end_to_end_speedup_vs_teacher_ar = ratio(end_to_end, teacher.map(|ar| ar.end_to_end));
        figures.end_to_end_speedup_vs_student_ar = ratio(end_to_end, student.map(|ar| ar.end_to_end));
    }
}

fn add_memory_ratios(model: &mut ModelResults) {
    let float = |bytes: Option<u64>| bytes.map(|bytes| bytes as f64);
    let ar = model.autoregressive();
    let batched = float(ar.and_then(|ar| ar.peak_memory_bytes));
    let batch1 = float(ar.and_then(|ar| ar.speed_peak_memory_bytes));
    for figures in &mut model.strategies {
        figures.peak_memory_over_ar = ratio(float(figures.peak_memory_bytes), batched);
        figures.speed_peak_memory_over_ar = ratio(float(figures.speed_peak_memory_bytes), batch1);
    }
}
