//! `compare`: two results example by example, with what chance alone would do beside each difference.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use cllm_core::decode::Strategy;
use cllm_core::task::{Task, Verdict};
use cllm_core::trajectory::FinishReason;
use cllm_core::{Error, Result, progress};
use serde::Serialize;

use crate::records::{AnswerRecord, Records, SAMPLES, SCHEMA_VERSION, SpeedRecord};
use crate::results::{Results, StrategyResults};
use crate::role::Role;
use crate::statistics::{bootstrap, mcnemar, ratio, wilson};
use crate::table::{self, number};

/// Below this p value a difference counts as real.
const LEVEL: f64 = 0.05;

/// What two results are to each other, over the examples that both answered.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Comparison {
    /// Version of this document.
    pub schema_version: u32,
    /// What was answered.
    pub benchmark: Task,
    /// Which split.
    pub split: String,
    /// What it is compared with.
    pub a: Side,
    /// What is compared with it.
    pub b: Side,
    /// Examples that both answered.
    pub pairs: usize,
    /// Those that A alone answered.
    pub unpaired_a: usize,
    /// Those that B alone answered.
    pub unpaired_b: usize,
    /// Pairs of which both have a score; the figures of accuracy are theirs.
    pub scored: usize,
    /// Right in A alone.
    pub a_only: usize,
    /// Right in B alone.
    pub b_only: usize,
    /// Accuracy of B less that of A.
    pub difference: Option<f64>,
    /// Its 95 % interval, by a paired percentile bootstrap.
    pub ci95: Option<[f64; 2]>,
    /// Of the exact McNemar test, two-sided; none where nothing is scored.
    pub mcnemar_p: Option<f64>,
    /// Share of A's right answers that are right in B.
    pub correct_kept_fraction: Option<f64>,
    /// Share of the pairs asked the same prompt that have the same tokens.
    pub equal_tokens: Option<f64>,
    /// None where no example was timed in both.
    pub speed: Option<SpeedComparison>,
    /// What follows, in a sentence.
    pub verdict: String,
}

/// One of the two.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Side {
    /// The folder of its run.
    pub run: PathBuf,
    /// Which model of it.
    pub role: Role,
    /// The model's folder.
    pub checkpoint: String,
    /// The strategy with its settings, as people read it.
    pub strategy: String,
    /// Right of scored.
    pub accuracy: Option<f64>,
    /// Wilson's 95 % interval of it.
    pub ci95: Option<[f64; 2]>,
    /// Answers that reached the length limit.
    pub unfinished: usize,
    /// Tokens over forwards.
    pub tokens_per_forward: Option<f64>,
}

/// Speed of the two at batch 1, prefill apart.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SpeedComparison {
    /// Examples timed in both.
    pub examples: usize,
    /// Whether hardware and libraries are the same; where not, the ratio is also one of machines.
    pub same_machine: bool,
    /// Tokens per second of A.
    pub a_tokens_per_second: Option<f64>,
    /// Tokens per second of B.
    pub b_tokens_per_second: Option<f64>,
    /// B's over A's.
    pub ratio: Option<f64>,
    /// Its 95 % interval, by a percentile bootstrap over the examples.
    pub ci95: Option<[f64; 2]>,
}

/// Records and the part of them that was chosen.
struct Chosen {
    run: PathBuf,
    records: Records,
    role: Role,
    strategy: Strategy,
}

/// What to take where nothing is said.
#[derive(Clone, Copy, PartialEq)]
enum Default {
    /// The teacher's autoregressive answers.
    Baseline,
    /// The student's fastest.
    Fastest,
}

/// Compares `b` with `a`, or with one folder alone its student with its teacher. The selectors name a role, a strategy or
/// both: `student/rolling`, `teacher`, `jacobi n=16`.
///
/// # Errors
/// When a run is missing or broken, a selector fits nothing, or the two answered other things.
pub fn compare(a: &Path, b: Option<&Path>, take_a: Option<&str>, take_b: Option<&str>) -> Result<Comparison> {
    let alone = if b.is_some() { Default::Fastest } else { Default::Baseline };
    let first = Chosen::read(a, take_a, "--a", alone)?;
    let second = Chosen::read(b.unwrap_or(a), take_b, "--b", Default::Fastest)?;
    if first.run == second.run && (first.role, first.strategy) == (second.role, second.strategy) {
        let message = format!("both sides are {}: name others with --a and --b, or two runs", first.name());
        return Err(Error::usage(message));
    }
    first.expect_alike(&second)?;
    Comparison::of(&first, &second)
}

impl Chosen {
    fn read(path: &Path, selector: Option<&str>, option: &str, default: Default) -> Result<Self> {
        let run = if path.is_dir() { path } else { path.parent().unwrap_or(Path::new("")) }.to_owned();
        if !path.exists() {
            return Err(Error::file(path, "is not there: give the folder of a run of cllm-eval, or its results.json"));
        }
        let records = Records::read(&run.join(SAMPLES))?;
        let results = Results::of(&records);
        if records.header.benchmark == Task::Perplexity {
            return Err(Error::file(
                &run,
                "holds perplexities and no answers: its results.json has both models beside each other",
            ));
        }
        let (role, strategy) = choose(&results, selector, default).map_err(|wrong| {
            let has: Vec<String> = entries(&results).map(|(role, found, _)| named(role, &found.label)).collect();
            Error::file(&run, format!("{wrong}; it has {}: choose with {option}", has.join(", ")))
        })?;
        Ok(Chosen { run, records, role, strategy })
    }

    fn name(&self) -> String {
        format!("{} of {}", named(self.role, &self.strategy.to_string()), self.run.display())
    }

    fn answers(&self) -> HashMap<&str, &AnswerRecord> {
        let mine = |answer: &&AnswerRecord| (answer.role, answer.strategy) == (self.role, self.strategy);
        self.records.answers.iter().filter(mine).map(|answer| (answer.id.as_str(), answer)).collect()
    }

    fn speeds(&self) -> HashMap<&str, &SpeedRecord> {
        let mine = |speed: &&SpeedRecord| (speed.role, speed.strategy) == (self.role, self.strategy);
        self.records.speeds.iter().filter(mine).map(|speed| (speed.id.as_str(), speed)).collect()
    }

    fn expect_alike(&self, other: &Chosen) -> Result<()> {
        let (here, there) = (&self.records.header, &other.records.header);
        if (here.benchmark, &here.split) != (there.benchmark, &there.split) {
            let of = |benchmark: Task, split: &str| format!("{} / {split}", benchmark.name());
            let (here, there) = (of(here.benchmark, &here.split), of(there.benchmark, &there.split));
            let message =
                format!("answered {there}, and {} answered {here}: only like can be compared", self.run.display());
            return Err(Error::file(&other.run, message));
        }
        let (here, there) = (&here.settings, &there.settings);
        if here.max_new_tokens != there.max_new_tokens {
            let (a, b) = (here.max_new_tokens, there.max_new_tokens);
            progress::log(format!("max_new_tokens is {a} in A and {b} in B: this too may make a difference"));
        }
        if here.temperature != there.temperature {
            let (a, b) = (here.temperature, there.temperature);
            progress::log(format!("temperature is {a} in A and {b} in B: this too may make a difference"));
        }
        Ok(())
    }

    fn side(&self, answers: &[&AnswerRecord], scored: &[bool]) -> Side {
        let right = scored.iter().filter(|&&right| right).count();
        let tokens: usize = answers.iter().map(|answer| answer.response_ids.len()).sum();
        let forwards: usize = answers.iter().map(|answer| answer.forwards).sum();
        let model = self.records.header.models.iter().find(|model| model.role == self.role);
        Side {
            run: self.run.clone(),
            role: self.role,
            checkpoint: model.map(|model| model.path.clone()).unwrap_or_default(),
            strategy: self.strategy.to_string(),
            accuracy: ratio(right as f64, scored.len() as f64),
            ci95: wilson(right, scored.len()),
            unfinished: answers.iter().filter(|answer| answer.finish_reason == FinishReason::Length).count(),
            tokens_per_forward: ratio(tokens as f64, forwards as f64),
        }
    }
}

/// A role and a strategy, as people read them and as a selector names them.
fn named(role: Role, strategy: &str) -> String {
    format!("{}/{strategy}", role.name())
}

/// Every role and strategy with answers.
fn entries(results: &Results) -> impl Iterator<Item = (Role, &StrategyResults, Strategy)> {
    results.models.iter().flat_map(|model| {
        let strategies = model.strategies.iter().zip(results.settings.strategies_of(model.model.role));
        strategies.filter(|(found, _)| found.examples > 0).map(|(found, strategy)| (model.model.role, found, strategy))
    })
}

/// The role and strategy that a selector names; what it leaves open is as the default says, and of several strategies the
/// fastest. What is wrong, in words.
fn choose(
    results: &Results,
    selector: Option<&str>,
    default: Default,
) -> std::result::Result<(Role, Strategy), String> {
    let (role, strategy) = parts(selector)?;
    let has = |role: Role| entries(results).any(|(other, _, _)| other == role);
    let preferred = match default {
        Default::Baseline => [Role::Teacher, Role::Student],
        Default::Fastest => [Role::Student, Role::Teacher],
    };
    let role = role.or_else(|| preferred.into_iter().find(|&role| has(role))).ok_or("it has no answers")?;
    let fits = |found: &StrategyResults, kind: Strategy| match strategy {
        Some(wanted) => found.name == wanted || found.label == wanted,
        None => default == Default::Fastest || kind == Strategy::Ar,
    };
    let mut fitting: Vec<_> =
        entries(results).filter(|&(other, found, kind)| other == role && fits(found, kind)).collect();
    // Autoregressive answers are what the others are held against, unless there are no others.
    if strategy.is_none() && fitting.iter().any(|&(_, _, kind)| kind != Strategy::Ar) {
        fitting.retain(|&(_, _, kind)| kind != Strategy::Ar);
    }
    let all_timed = fitting.iter().all(|(_, found, _)| found.tokens_per_second.is_some());
    let speed = |found: &StrategyResults| {
        if all_timed { found.tokens_per_second } else { found.tokens_per_forward }.unwrap_or(0.0)
    };
    let fastest = fitting.into_iter().max_by(|(_, a, _), (_, b, _)| speed(a).total_cmp(&speed(b)));
    let none = || format!("has no answers of {}", named(role, strategy.unwrap_or("ar")));
    fastest.map(|(role, _, strategy)| (role, strategy)).ok_or_else(none)
}

/// The role and the strategy of a selector, as far as it names them.
fn parts(selector: Option<&str>) -> std::result::Result<(Option<Role>, Option<&str>), String> {
    match selector.map(|text| (text, text.split_once('/'))) {
        None => Ok((None, None)),
        Some((text, None)) => Ok(role_named(text).map_or((None, Some(text)), |role| (Some(role), None))),
        Some((_, Some((role, strategy)))) => {
            let unknown = || format!("`{role}` is neither teacher nor student");
            Ok((Some(role_named(role).ok_or_else(unknown)?), Some(strategy)))
        }
    }
}

fn role_named(text: &str) -> Option<Role> {
    [Role::Teacher, Role::Student].into_iter().find(|&role| role.name() == text)
}

impl Comparison {
    /// As people read it in the terminal.
    pub fn text(&self) -> String {
        let Comparison { a, b, pairs, scored, .. } = self;
        let row = |name: &str, side: &Side, rate: Option<f64>| {
            let accuracy = table::accuracy(side.accuracy, side.ci95);
            let unfinished = format!("{} of {pairs}", side.unfinished);
            let of_forward = number(side.tokens_per_forward, 2, "");
            let what = vec![name.to_owned(), named(side.role, &side.strategy), side.run.display().to_string()];
            [what, vec![accuracy, unfinished, of_forward, number(rate, 1, "")]].concat()
        };
        let speed = self.speed.as_ref();
        let heads = ["", "model/strategy", "run", "accuracy (95 %)", "unfinished", "tokens/forward", "tokens/s"];
        let rows = [
            row("A", a, speed.and_then(|speed| speed.a_tokens_per_second)),
            row("B", b, speed.and_then(|speed| speed.b_tokens_per_second)),
        ];
        let points = |value: f64| format!("{:+.1}", 100.0 * value);
        let interval = |ci95: Option<[f64; 2]>, show: &dyn Fn(f64) -> String| {
            ci95.map_or_else(String::new, |[low, high]| format!(" (95 %: {} to {})", show(low), show(high)))
        };
        let share = |rate: Option<f64>| number(rate.map(|rate| 100.0 * rate), 1, " %");
        let mut text = table::drawn(&heads, 3, rows);
        text += &format!(
            "{pairs} examples of {} / {}, {scored} of them scored; {} in A alone and {} in B alone are left out\n\
             accuracy of B less A: {} points{}, by a paired percentile bootstrap\n\
             right in A alone: {}; right in B alone: {}; right in A and still right in B: {} of A's; equal tokens: {}\n",
            self.benchmark.name(),
            self.split,
            self.unpaired_a,
            self.unpaired_b,
            self.difference.map_or_else(|| "-".to_owned(), points),
            interval(self.ci95, &points),
            self.a_only,
            self.b_only,
            share(self.correct_kept_fraction),
            share(self.equal_tokens),
        );
        if let Some(speed) = speed {
            let other = if speed.same_machine { "" } else { "; the machines or libraries differ" };
            let times = |value: f64| format!("{value:.2}x");
            let (faster, ci95) = (number(speed.ratio, 2, "x"), interval(speed.ci95, &times));
            text += &format!("speed of B over A: {faster}{ci95} on {} examples timed in both{other}\n", speed.examples);
        }
        text + &self.verdict + "\n"
    }

    fn of(first: &Chosen, second: &Chosen) -> Result<Self> {
        let (answers_a, answers_b) = (first.answers(), second.answers());
        let mut pairs: Vec<(&AnswerRecord, &AnswerRecord)> =
            answers_a.iter().filter_map(|(id, &a)| Some((a, *answers_b.get(id)?))).collect();
        // The order of the prompt set, so that the same files give the same intervals.
        pairs.sort_by_key(|(a, _)| a.index);
        if pairs.is_empty() {
            let message =
                format!("has no example in common with {}: compare runs of the same prompts", first.run.display());
            return Err(Error::file(&second.run, message));
        }
        if let Some((a, b)) = pairs.iter().find(|(a, b)| (&a.source, &a.reference) != (&b.source, &b.reference)) {
            let message = format!(
                "example `{}` is of {} with another source or reference than in {}: these runs answered other prompts \
                 under the same ids",
                b.id,
                b.source,
                first.run.display()
            );
            return Err(Error::file(&second.run, format!("{message} ({})", a.source)));
        }
        let is_scored =
            |(a, b): &&(&AnswerRecord, &AnswerRecord)| a.verdict != Verdict::Unscored && b.verdict != Verdict::Unscored;
        let rights: Vec<(bool, bool)> = pairs
            .iter()
            .filter(is_scored)
            .map(|(a, b)| (a.verdict == Verdict::Correct, b.verdict == Verdict::Correct))
            .collect();
        let count = |of: (bool, bool)| rights.iter().filter(|&&pair| pair == of).count();
        let (a_only, b_only, both) = (count((true, false)), count((false, true)), count((true, true)));
        let gain = |at: usize| f64::from(i8::from(rights[at].1) - i8::from(rights[at].0));
        let mean_gain = |drawn: &[usize]| Some(drawn.iter().map(|&at| gain(at)).sum::<f64>() / drawn.len() as f64);
        let difference = ratio(b_only as f64 - a_only as f64, rights.len() as f64);
        let mcnemar_p = (!rights.is_empty()).then(|| mcnemar(a_only, b_only));
        // Second turns have other prompts where the answers to the first differ: their answers cannot be held against each other.
        let alike = || pairs.iter().filter(|(a, b)| a.prompt == b.prompt);
        let equal = alike().filter(|(a, b)| a.response_ids == b.response_ids).count();
        let (of_a, of_b): (Vec<_>, Vec<_>) = pairs.iter().copied().unzip();
        let (rights_a, rights_b): (Vec<_>, Vec<_>) = rights.iter().copied().unzip();
        Ok(Comparison {
            schema_version: SCHEMA_VERSION,
            benchmark: first.records.header.benchmark,
            split: first.records.header.split.clone(),
            a: first.side(&of_a, &rights_a),
            b: second.side(&of_b, &rights_b),
            pairs: pairs.len(),
            unpaired_a: answers_a.len() - pairs.len(),
            unpaired_b: answers_b.len() - pairs.len(),
            scored: rights.len(),
            a_only,
            b_only,
            difference,
            ci95: bootstrap(rights.len(), mean_gain),
            mcnemar_p,
            correct_kept_fraction: ratio(both as f64, (both + a_only) as f64),
            equal_tokens: ratio(equal as f64, alike().count() as f64),
            speed: speed(first, second),
            verdict: verdict(difference, mcnemar_p),
        })
    }
}

fn speed(first: &Chosen, second: &Chosen) -> Option<SpeedComparison> {
    let speeds_b = second.speeds();
    let mut pairs: Vec<(&SpeedRecord, &SpeedRecord)> =
        first.speeds().into_iter().filter_map(|(id, a)| Some((a, *speeds_b.get(id)?))).collect();
    pairs.sort_by_key(|(a, _)| a.index);
    let (of_a, of_b): (Vec<_>, Vec<_>) = pairs.into_iter().unzip();
    let speedup = |drawn: &[usize]| ratio(rate(&of_b, drawn), rate(&of_a, drawn));
    let all: Vec<usize> = (0..of_a.len()).collect();
    let (here, there) = (&first.records.header, &second.records.header);
    (!all.is_empty()).then(|| SpeedComparison {
        examples: all.len(),
        same_machine: (&here.hardware, &here.toolkit) == (&there.hardware, &there.toolkit),
        a_tokens_per_second: rate(&of_a, &all),
        b_tokens_per_second: rate(&of_b, &all),
        ratio: speedup(&all),
        ci95: bootstrap(all.len(), speedup),
    })
}

/// Tokens per second of some of the timings.
fn rate(speeds: &[&SpeedRecord], drawn: &[usize]) -> Option<f64> {
    let tokens: usize = drawn.iter().map(|&at| speeds[at].tokens).sum();
    ratio(tokens as f64, drawn.iter().map(|&at| speeds[at].seconds).sum::<f64>())
}

fn verdict(difference: Option<f64>, p: Option<f64>) -> String {
    match (difference, p) {
        (Some(difference), Some(p)) if p < LEVEL => {
            let word = if difference > 0.0 { "more" } else { "less" };
            format!("the difference is real at 5 %: B is {word} accurate than A (exact McNemar p = {p:.4})")
        }
        (_, Some(p)) => {
            format!("the difference in accuracy is not told from chance at 5 % (exact McNemar p = {p:.4})")
        }
        _ => "no answer was scored in both: nothing can be said of accuracy".to_owned(),
    }
}
