//! `compare` on made-up records.

use std::path::Path;

use cllm_core::decode::Strategy;
use cllm_core::task::Verdict;
use cllm_eval::compare::{Comparison, compare};
use cllm_eval::records::{Records, SAMPLES};
use cllm_eval::role::Role;

use crate::made_up::{JACOBI, records};

/// Writes a run; the folder lives as long as what is given back.
fn written(records: &Records) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    records.write(&dir.path().join(SAMPLES)).unwrap();
    dir
}

fn refused(a: &Path, b: Option<&Path>, take_a: Option<&str>, take_b: Option<&str>) -> String {
    compare(a, b, take_a, take_b).unwrap_err().to_string()
}

/// Forty examples: the teacher has all right, the student all but the first `lost`.
fn forty(lost: usize) -> Records {
    let mut records = records();
    let last: Vec<_> = records.answers.iter().filter(|answer| answer.index == 0).cloned().collect();
    records.answers.clear();
    for answer in &last {
        for index in 0..40 {
            let verdict = match answer.role == Role::Student && index < lost {
                true => Verdict::Incorrect,
                false => Verdict::Correct,
            };
            records.answers.push(cllm_eval::records::AnswerRecord {
                index,
                id: format!("e{index}"),
                verdict,
                ..answer.clone()
            });
        }
    }
    records
}

#[test]
fn a_run_alone_compares_its_student_with_its_teacher() {
    let run = written(&records());
    let found = compare(run.path(), None, None, None).unwrap();
    let Comparison { a, b, .. } = &found;
    assert_eq!((a.role, a.strategy.as_str(), a.checkpoint.as_str()), (Role::Teacher, "ar", "t"));
    assert_eq!((b.role, b.strategy.as_str(), b.checkpoint.as_str()), (Role::Student, "jacobi n=4", "s"));
    assert_eq!((found.pairs, found.scored, found.unpaired_a, found.unpaired_b), (4, 4, 0, 0));
    // Right are examples 0, 1, 2 of the teacher and 0, 3 of the student: three differ, 2 · (1 + 3) / 8.
    assert_eq!((found.a_only, found.b_only, found.mcnemar_p), (2, 1, Some(1.0)));
    assert_eq!((a.accuracy, b.accuracy, found.difference), (Some(0.75), Some(0.5), Some(-0.25)));
    assert_eq!((found.correct_kept_fraction, found.equal_tokens), (Some(1.0 / 3.0), Some(0.75)));
    assert_eq!((a.unfinished, b.unfinished), (1, 1));
    assert_eq!((a.tokens_per_forward, b.tokens_per_forward), (Some(1.0), Some(4.0)));
    let speed = found.speed.as_ref().unwrap();
    assert_eq!((speed.examples, speed.same_machine), (2, true));
    assert_eq!((speed.a_tokens_per_second, speed.b_tokens_per_second), (Some(1.0), Some(4.0)));
    // Every example is four times as fast, so every resample is.
    assert_eq!((speed.ratio, speed.ci95), (Some(4.0), Some([4.0, 4.0])));
    let text = found.text();
    assert!(text.contains("-25.0 points") && text.contains("4.00x (95 %: 4.00x to 4.00x)"), "{text}");
    assert!(found.verdict.contains("not told from chance at 5 %") && text.ends_with(&(found.verdict + "\n")), "{text}");
}

#[test]
fn a_difference_is_real_where_chance_is_unlikely_to_make_it() {
    // Six of forty: 2 / 2^6 = 0.03125, five: 2 / 2^5 = 0.0625.
    let found = compare(written(&forty(6)).path(), None, None, None).unwrap();
    assert!((found.mcnemar_p.unwrap() - 0.03125).abs() < 1e-12, "{found:?}");
    assert!(found.verdict.contains("is real at 5 %: B is less accurate"), "{}", found.verdict);
    // The mean of forty, of which six are -1: standard error √(0.15 · 0.85 / 40) = 0.0565.
    let [low, high] = found.ci95.unwrap();
    assert!((low + 0.2625).abs() < 0.026 && (high + 0.04).abs() < 0.026, "{low} {high}");
    let other_way = written(&forty(6));
    let found = compare(other_way.path(), None, Some("student"), Some("teacher/ar")).unwrap();
    assert!(found.difference == Some(0.15) && found.verdict.contains("B is more accurate"), "{found:?}");
    let found = compare(written(&forty(5)).path(), None, None, None).unwrap();
    assert!(found.verdict.contains("not told from chance"), "{}", found.verdict);
}

#[test]
fn two_runs_are_paired_by_id_and_only_like_is_compared() {
    let first = written(&records());
    let mut other = records();
    for (number, answer) in other.answers.iter_mut().enumerate() {
        // One that the first run has not.
        if answer.index == 3 {
            answer.id = "new".into();
        }
        // Another order; ids are what counts.
        answer.index = (number + 1) % 4;
    }
    let second = written(&other);
    let found = compare(first.path(), Some(&second.path().join("results.json")), None, None);
    assert!(found.unwrap_err().to_string().contains("is not there"));
    let found = compare(first.path(), Some(second.path()), None, Some("ar")).unwrap();
    assert_eq!((found.pairs, found.unpaired_a, found.unpaired_b), (3, 1, 1));
    assert_eq!((found.a.strategy.as_str(), found.b.strategy.as_str()), ("jacobi n=4", "ar"));
    assert_eq!((found.a.accuracy, found.b.accuracy), (Some(1.0 / 3.0), Some(2.0 / 3.0)));

    let with = |change: &dyn Fn(&mut Records)| {
        let mut records = records();
        change(&mut records);
        let run = written(&records);
        refused(first.path(), Some(run.path()), None, None)
    };
    let error = with(&|records| records.header.split = "dev".into());
    assert!(error.contains("jsonl / dev") && error.contains("jsonl / test"), "{error}");
    let error = with(&|records| records.answers.iter_mut().for_each(|answer| answer.id.push('x')));
    assert!(error.contains("no example in common"), "{error}");
    let error = with(&|records| records.answers.iter_mut().for_each(|answer| answer.reference = None));
    assert!(error.contains("example `e0`") && error.contains("other prompts"), "{error}");
}

#[test]
fn speeds_of_other_machines_are_told() {
    let (first, mut other) = (written(&records()), records());
    other.header.hardware.cpu = "another".into();
    other.speeds.retain(|speed| speed.index == 1);
    let second = written(&other);
    let found = compare(first.path(), Some(second.path()), Some("teacher/ar"), Some("teacher/ar")).unwrap();
    let speed = found.speed.as_ref().unwrap();
    assert_eq!((speed.examples, speed.same_machine, speed.ratio), (1, false, Some(1.0)));
    assert!(found.text().contains("the machines or libraries differ"), "{}", found.text());
    other.speeds.clear();
    let found = compare(first.path(), Some(written(&other).path()), None, None).unwrap();
    assert_eq!(found.speed, None);
}

#[test]
fn selectors_name_model_and_strategy() {
    let run = written(&records());
    let taken = |a: Option<&str>, b: Option<&str>| {
        let found = compare(run.path(), None, a, b).unwrap();
        [(found.a.role, found.a.strategy), (found.b.role, found.b.strategy)]
    };
    let (ar, jacobi) = ("ar".to_owned(), "jacobi n=4".to_owned());
    assert_eq!(taken(Some("student"), None), [(Role::Student, ar.clone()), (Role::Student, jacobi.clone())]);
    assert_eq!(taken(None, Some("teacher")), [(Role::Teacher, ar.clone()), (Role::Teacher, jacobi.clone())]);
    let both = taken(Some("teacher/jacobi"), Some("student/jacobi n=4"));
    assert_eq!(both, [(Role::Teacher, jacobi.clone()), (Role::Student, jacobi.clone())]);
    let error = refused(run.path(), None, Some("student/rolling"), None);
    assert!(
        error.contains("no answers of student/rolling") && error.contains("teacher/ar, teacher/jacobi n=4"),
        "{error}"
    );
    let error = refused(run.path(), None, None, Some("pupil/ar"));
    assert!(error.contains("`pupil` is neither") && error.contains("--b"), "{error}");
    let error = refused(run.path(), None, Some("student"), Some("student/ar"));
    assert!(error.contains("both sides are student/ar"), "{error}");

    // A model alone: its own autoregressive answers are the baseline. Of several windows the fastest is taken.
    let mut alone = records();
    alone.answers.retain(|answer| answer.role == Role::Student);
    alone.header.models.remove(0);
    let slower = Strategy::Rolling { n: 8, pool: 0 };
    let more: Vec<_> = alone.answers.iter().filter(|answer| answer.strategy == JACOBI).cloned().collect();
    alone.answers.extend(more.into_iter().map(|mut answer| {
        (answer.strategy, answer.forwards) = (slower, 3);
        answer
    }));
    alone.speeds.clear();
    alone.header.settings.strategies.push(slower);
    let found = compare(written(&alone).path(), None, None, None).unwrap();
    assert_eq!((found.a.strategy, found.b.strategy), (ar, jacobi));
}

#[test]
fn answers_to_other_prompts_do_not_count_among_equal_tokens() {
    let mut made = records();
    // As in a second turn after another first answer: of the one pair that differs.
    let students = made.answers.iter_mut().filter(|answer| answer.role == Role::Student && answer.index == 1);
    students.for_each(|answer| answer.prompt = "another".into());
    let run = written(&made);
    let found = compare(run.path(), None, None, None).unwrap();
    assert_eq!((found.pairs, found.equal_tokens), (4, Some(1.0)));
}
