//! The headline of a run: the speed-up of its fastest strategy over the teacher's autoregressive
//! decoding, and its cost.

use cllm_core::decode::Strategy;
use serde::Serialize;

use super::run::Run;
use crate::results::{ModelResults, Results, StrategyResults};
use crate::role::Role;
use crate::statistics::{SIGNIFICANCE_LEVEL, mcnemar};
use crate::table::{
    format_accuracy, format_count, format_interval, format_number, format_percent, format_points, format_share,
    format_speed, format_whole, notes,
};

#[derive(Debug, Serialize)]
pub(super) struct Headline {
    /// Benchmark and split.
    title: String,
    /// The figure, shown in large type.
    number: String,
    /// Whether the figure is a slow-down.
    is_slower: bool,
    /// What the figure measures.
    caption: String,
    /// What became of the accuracy; `None` without a teacher or scores.
    verdict: Option<Verdict>,
    /// Intervals, accuracy and unfinished answers.
    details: Vec<String>,
}

/// The student's accuracy against its teacher's, in words and a colour.
#[derive(Debug, Serialize)]
struct Verdict {
    text: String,
    /// CSS class: `good`, `neutral` or `bad`.
    class: &'static str,
}

impl Headline {
    /// `None` for a run that measured nothing.
    pub(super) fn from_run(run: &Run) -> Option<Self> {
        let (results, title) = (&run.results, run.title.clone());
        let Some((role, fastest)) = results.headline() else {
            let model = results.models.last()?;
            let number = format!("{:.2}", model.perplexity.as_ref()?.value);
            let caption = format!("perplexity of the {}", model.model.role);
            return Some(Headline { title, number, is_slower: false, caption, verdict: None, details: notes(results) });
        };
        let (name, label) = (format!("{role}, {}", fastest.label), &fastest.label);
        let has_student = results.model(Role::Student).is_some();
        let drafts_for_teacher = role == Role::Teacher && has_student;
        let (speedup, interval) = results.speedup(fastest);
        let (number, caption) = match (speedup, fastest.tokens_per_second) {
            (Some(speedup), _) => {
                let baseline = match results.model(Role::Teacher) {
                    Some(_) if drafts_for_teacher => format!("the teacher alone ({label}, against autoregressive)"),
                    Some(_) if has_student => format!("the teacher ({name}, against autoregressive)"),
                    _ => format!("autoregressive decoding of the same model ({label})"),
                };
                (format!("{speedup:.2}x"), format!("as fast at batch 1 as {baseline}"))
            }
            (None, speed @ Some(_)) => (format_speed(speed), format!("tokens/s at batch 1 ({name})")),
            (None, None) => (format_number(fastest.tokens_per_forward, 2, ""), format!("tokens per forward ({name})")),
        };
        let own_accuracy =
            (fastest.scored > 0).then(|| format!("accuracy {}", format_accuracy(fastest.accuracy, fastest.ci95)));
        let finished = fastest.tokens_per_forward_finished;
        let speedup_interval = interval.map(|ends| {
            let [low_end, high_end] = ends.map(|end| format!("{end:.2}x"));
            let verdict = match ends {
                [low, high] if low <= 1.0 && high >= 1.0 => ": no significant difference in speed",
                _ => "",
            };
            let examples = format_count(fastest.speed_examples, "timed example");
            format!("95 % interval of the speed-up: {low_end} to {high_end}, over {examples}{verdict}")
        });
        let details = [
            speedup_interval,
            own_accuracy,
            finished.map(|value| format!("{value:.2} tokens per forward in finished answers")),
            Some(unfinished(results, role, fastest)),
        ];
        let adapts_teacher = results.model(role).is_some_and(|model| model.model.adapts_teacher);
        let teacher_decides = drafts_for_teacher || adapts_teacher;
        let same_answers = if teacher_decides { same_answers(results, fastest) } else { None };
        let verdict = same_answers.or_else(|| accuracy_verdict(results, role, fastest));
        let details = details.into_iter().flatten().collect();
        let is_slower = speedup.is_some_and(|speedup| speedup < 0.995);
        Some(Headline { title, number, is_slower, caption, verdict, details })
    }
}

/// A difference that is not significant counts as none if it excludes a larger loss than this.
const LARGEST_UNNOTICED_LOSS: f64 = 0.05;

/// Of a teacher with a draft model, or with adapters for draft tokens: its answers are its own.
fn same_answers(results: &Results, fastest: &StrategyResults) -> Option<Verdict> {
    let (fraction, dtype) = (fastest.exact_match_vs_ar?, &results.hardware.dtype);
    let rounding = match fraction < 1.0 && dtype != "float32" {
        true => format!("; the others differ where {dtype} rounds otherwise"),
        false => String::new(),
    };
    let same = format_percent(Some(fraction));
    let text =
        format!("The teacher decides every token: {same} of its answers are the same as without drafts{rounding}");
    Some(Verdict { text, class: "neutral" })
}

fn accuracy_verdict(results: &Results, role: Role, fastest: &StrategyResults) -> Option<Verdict> {
    let pair = results.paired.iter().find(|pair| role == Role::Student && pair.student == fastest.label)?;
    let difference = pair.difference?;
    let is_significant = mcnemar(pair.student_only, pair.teacher_only) < SIGNIFICANCE_LEVEL;
    let may_be_lost = pair.ci95.is_none_or(|[low, _]| low < -LARGEST_UNNOTICED_LOSS);
    let (word, class) = match (is_significant, difference > 0.0) {
        (false, _) if may_be_lost => (
            format!("No significant difference, but {} are too few to tell", format_count(pair.examples, "example")),
            "neutral",
        ),
        (false, _) => ("Accuracy kept: no significant difference".to_owned(), "neutral"),
        (true, true) => ("Accuracy gained, significantly".to_owned(), "good"),
        (true, false) => ("Accuracy lost, significantly".to_owned(), "bad"),
    };
    let (points, interval) = (format_points(difference), format_interval(pair.ci95, format_points));
    Some(Verdict { text: format!("{word}. {points} points against the teacher{interval}"), class })
}

fn unfinished(results: &Results, role: Role, fastest: &StrategyResults) -> String {
    let own = format!("{} answers unfinished", format_share(fastest.unfinished, fastest.examples));
    match (results.model(Role::Teacher).and_then(ModelResults::autoregressive), role) {
        (Some(teacher), Role::Student) => format!("{own} (teacher: {})", format_whole(teacher.unfinished)),
        (Some(teacher), Role::Teacher) if fastest.strategy != Strategy::Ar => {
            format!("{own} (autoregressive: {})", format_whole(teacher.unfinished))
        }
        _ => own,
    }
}
