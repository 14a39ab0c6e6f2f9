//! The student's accuracy against the teacher's, paired by example.

use std::collections::HashMap;

use cllm_core::decode::Strategy;
use cllm_core::task::Verdict;

use super::document::PairedDifference;
use crate::records::Records;
use crate::role::Role;
use crate::statistics::{paired_difference, ratio};

/// Compares each strategy of the student with the teacher's autoregressive answers, or with the
/// same strategy of the teacher if it has no autoregressive answers.
pub(super) fn differences(records: &Records) -> Vec<PairedDifference> {
    let header = &records.header;
    if Role::ALL.iter().any(|&role| header.model(role).is_none()) {
        return Vec::new();
    }
    header
        .strategies_of(Role::Student)
        .map(|strategy| {
            let reference = if header.settings.strategies.contains(&Strategy::Ar) { Strategy::Ar } else { strategy };
            difference(records, strategy, reference)
        })
        .collect()
}

fn difference(records: &Records, student: Strategy, teacher: Strategy) -> PairedDifference {
    let of_teacher = scores(records, Role::Teacher, teacher);
    let pairs: Vec<(bool, bool)> = scores(records, Role::Student, student)
        .into_iter()
        .filter_map(|(index, correct)| Some((correct, *of_teacher.get(&index)?)))
        .collect();
    let count = |pair: (bool, bool)| pairs.iter().filter(|&&other| other == pair).count();
    let (both, student_only, teacher_only) = (count((true, true)), count((true, false)), count((false, true)));
    PairedDifference {
        student: student.to_string(),
        teacher: teacher.to_string(),
        examples: pairs.len(),
        student_only,
        teacher_only,
        difference: ratio(student_only as f64 - teacher_only as f64, pairs.len() as f64),
        ci95: paired_difference(student_only, teacher_only, pairs.len()),
        correct_kept_fraction: ratio(both as f64, (both + teacher_only) as f64),
    }
}

/// Maps the prompt position of each scored answer to whether the answer is correct.
fn scores(records: &Records, role: Role, strategy: Strategy) -> HashMap<usize, bool> {
    let answers = records.answers_of(role, strategy).filter(|answer| answer.verdict != Verdict::Unscored);
    answers.map(|answer| (answer.index, answer.verdict == Verdict::Correct)).collect()
}
