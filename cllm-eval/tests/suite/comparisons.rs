//! `compare` on made-up records.

use std::path::Path;

use cllm_core::decode::Strategy;
use cllm_core::task::Verdict;
use cllm_eval::compare::{Comparison, compare};
use cllm_eval::records::{Records, SAMPLES};
use cllm_eval::results::Results;
use cllm_eval::role::Role;

use crate::made_up::{JACOBI, records};

/// Writes a run into a folder, which is removed when the returned value is dropped.
fn written(records: &Records) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    records.write(&dir.path().join(SAMPLES)).unwrap();
    dir
}

fn refused(a: &Path, b: Option<&Path>, take_a: Option<&str>, take_b: Option<&str>) -> String {
    compare(a, b, take_a, take_b).unwrap_err().to_string()
}

/// Forty examples. The teacher answers all correctly, the student all but the first `lost`.
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
    let mut records = records();
    records.header.settings.prompts = Some("runs/chats.jsonl".into());
    let run = written(&records);
    let comparison = compare(run.path(), None, None, None).unwrap();
    let Comparison { a, b, .. } = &comparison;
    assert_eq!((a.role, a.strategy.as_str(), a.checkpoint.as_str()), (Role::Teacher, "ar", "t"));
    assert_eq!((b.role, b.strategy.as_str(), b.checkpoint.as_str()), (Role::Student, "jacobi n=4", "s"));
    assert_eq!((comparison.pairs, comparison.scored, comparison.unpaired_a, comparison.unpaired_b), (4, 4, 0, 0));
    // The teacher answered examples 0, 1 and 2 correctly, the student 0 and 3. Three differ:
    // 2 · (1 + 3) / 8 = 1.
    assert_eq!((comparison.a_only, comparison.b_only, comparison.mcnemar_p), (2, 1, Some(1.0)));
    assert_eq!((a.accuracy, b.accuracy, comparison.difference), (Some(0.75), Some(0.5), Some(-0.25)));
    assert_eq!((comparison.correct_kept_fraction, comparison.equal_tokens), (Some(1.0 / 3.0), Some(0.75)));
    assert_eq!((a.unfinished, b.unfinished), (1, 1));
    assert_eq!((a.tokens_per_forward, b.tokens_per_forward), (Some(1.0), Some(4.0)));
    let speed = comparison.speed.as_ref().unwrap();
    assert_eq!((speed.examples, speed.same_machine), (2, true));
    assert_eq!((speed.a_tokens_per_second, speed.b_tokens_per_second), (Some(1.0), Some(4.0)));
    // Every example is four times as fast, and so is every resample.
    assert_eq!((speed.ratio, speed.ci95), (Some(4.0), Some([4.0, 4.0])));
    let text = comparison.text();
    assert!(text.contains("4 examples of chats.jsonl / test, 4 of them scored"), "{text}");
    assert!(text.contains("−25.0 points") && text.contains("4.00x (95 %: 4.00x to 4.00x)"), "{text}");
    assert!(
        comparison.verdict.contains("no significant difference in accuracy (McNemar, p = 1.00)")
            && text.ends_with(&(comparison.verdict + "\n")),
        "{text}"
    );
}

#[test]
fn a_difference_is_significant_if_chance_is_unlikely_to_cause_it() {
    // Six of forty: 2 / 2^6 = 0.03125, five: 2 / 2^5 = 0.0625.
    let comparison = compare(written(&forty(6)).path(), None, None, None).unwrap();
    assert!((comparison.mcnemar_p.unwrap() - 0.03125).abs() < 1e-12, "{comparison:?}");
    assert!(
        comparison.verdict.contains("B is significantly less accurate than A (McNemar, p = 0.03)"),
        "{}",
        comparison.verdict
    );
    // Bonett and Price: a difference of (1 - 7) / 42, and its standard error √((8/42 - 6²/42²) / 42) = 0.0636.
    let [low, high] = comparison.ci95.unwrap();
    assert!((low + 0.2676).abs() < 1e-3 && (high + 0.0181).abs() < 1e-3, "{low} {high}");
    // The results of the run have the same interval.
    assert_eq!(comparison.ci95, Results::from_records(&forty(6)).paired[1].ci95);
    // That nothing differs in forty examples does not say that nothing ever will.
    let [low, high] = compare(written(&forty(0)).path(), None, None, None).unwrap().ci95.unwrap();
    assert!((-0.08..-0.05).contains(&low) && (0.05..0.08).contains(&high), "{low} {high}");
    let other_way = written(&forty(6));
    let comparison = compare(other_way.path(), None, Some("student"), Some("teacher/ar")).unwrap();
    assert!(
        comparison.difference == Some(0.15) && comparison.verdict.contains("B is significantly more accurate"),
        "{comparison:?}"
    );
    let comparison = compare(written(&forty(5)).path(), None, None, None).unwrap();
    assert!(comparison.verdict.contains("no significant difference"), "{}", comparison.verdict);
}

#[test]
fn two_runs_are_paired_by_id_and_must_have_the_same_prompts() {
    let first = written(&records());
    let mut other = records();
    for (number, answer) in other.answers.iter_mut().enumerate() {
        // An example that the first run does not have.
        if answer.index == 3 {
            answer.id = "new".into();
        }
        // The order differs; only ids count.
        answer.index = (number + 1) % 4;
    }
    let second = written(&other);
    let comparison = compare(first.path(), Some(&second.path().join("results.json")), None, None);
    assert!(comparison.unwrap_err().to_string().contains("does not exist"));
    let comparison = compare(first.path(), Some(second.path()), None, Some("ar")).unwrap();
    assert_eq!((comparison.pairs, comparison.unpaired_a, comparison.unpaired_b), (3, 1, 1));
    assert_eq!((comparison.a.strategy.as_str(), comparison.b.strategy.as_str()), ("jacobi n=4", "ar"));
    assert_eq!((comparison.a.accuracy, comparison.b.accuracy), (Some(1.0 / 3.0), Some(2.0 / 3.0)));

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
fn a_speed_comparison_across_machines_says_so() {
    let (first, mut other) = (written(&records()), records());
    other.header.hardware.cpu = "another".into();
    other.speeds.retain(|speed| speed.index == 1);
    let second = written(&other);
    let comparison = compare(first.path(), Some(second.path()), Some("teacher/ar"), Some("teacher/ar")).unwrap();
    let speed = comparison.speed.as_ref().unwrap();
    assert_eq!((speed.examples, speed.same_machine, speed.ratio), (1, false, Some(1.0)));
    let text = comparison.text().split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(text.contains("the machines or libraries differ"), "{text}");
    other.speeds.clear();
    let comparison = compare(first.path(), Some(written(&other).path()), None, None).unwrap();
    assert_eq!(comparison.speed, None);
}

#[test]
fn the_baseline_of_adapters_for_drafts_is_their_teacher() {
    let mut records = records();
    let gated = Strategy::gated(4);
    records.header.settings.strategies = vec![Strategy::Ar, gated];
    records.header.models[1].adapts_teacher = true;
    records.answers.iter_mut().filter(|answer| answer.strategy == JACOBI).for_each(|answer| answer.strategy = gated);
    let comparison = compare(written(&records).path(), None, Some("student"), None).unwrap();
    assert_eq!((comparison.a.role, &comparison.a.strategy[..]), (Role::Teacher, "ar"));
    assert_eq!((comparison.b.role, &comparison.b.strategy[..]), (Role::Student, "gated n=4"));
}

#[test]
fn selectors_choose_model_and_strategy() {
    let run = written(&records());
    let chosen = |a: Option<&str>, b: Option<&str>| {
        let comparison = compare(run.path(), None, a, b).unwrap();
        [(comparison.a.role, comparison.a.strategy), (comparison.b.role, comparison.b.strategy)]
    };
    let (ar, jacobi) = ("ar".to_owned(), "jacobi n=4".to_owned());
    assert_eq!(chosen(Some("student"), None), [(Role::Student, ar.clone()), (Role::Student, jacobi.clone())]);
    assert_eq!(chosen(None, Some("teacher")), [(Role::Teacher, ar.clone()), (Role::Teacher, jacobi.clone())]);
    let both = chosen(Some("teacher/jacobi"), Some("student/jacobi n=4"));
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

    // The baseline of a single model is its own autoregressive decoding. If several strategies
    // match, the fastest is chosen.
    let mut alone = records();
    alone.answers.retain(|answer| answer.role == Role::Student);
    alone.header.models.remove(0);
    let slower = Strategy::rolling(8);
    let more: Vec<_> = alone.answers.iter().filter(|answer| answer.strategy == JACOBI).cloned().collect();
    alone.answers.extend(more.into_iter().map(|mut answer| {
        (answer.strategy, answer.forwards) = (slower, 3);
        answer
    }));
    alone.speeds.clear();
    alone.header.settings.strategies.push(slower);
    let comparison = compare(written(&alone).path(), None, None, None).unwrap();
    assert_eq!((comparison.a.strategy, comparison.b.strategy), (ar, jacobi));
}

#[test]
fn answers_to_different_prompts_do_not_count_in_equal_tokens() {
    let mut records = records();
    // As in a second turn after a different first answer. This is the one pair whose tokens differ.
    let students = records.answers.iter_mut().filter(|answer| answer.role == Role::Student && answer.index == 1);
    students.for_each(|answer| answer.prompt = "another".into());
    let run = written(&records);
    let comparison = compare(run.path(), None, None, None).unwrap();
    assert_eq!((comparison.pairs, comparison.equal_tokens), (4, Some(1.0)));
}
