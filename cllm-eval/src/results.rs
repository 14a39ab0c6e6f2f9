//! `results.json`: every figure, computed from the records alone.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use crate::spider_difficulty::{Difficulty, difficulty};
use cllm_core::decode::{Sampling, Strategy};
use cllm_core::environment::{Hardware, Toolkit};
use cllm_core::task::{Task, Verdict};
use cllm_core::trajectory::FinishReason;
use cllm_core::{Error, Result};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::acceptance::Acceptance;
use crate::config::RunSettings;
use crate::records::{AnswerRecord, ModelEntry, Records, SpeedRecord, expect_version};
use crate::role::Role;
use crate::run::perplexity::Perplexity;
use crate::similarity::Similarity;
use crate::statistics::{paired, ratio, wilson};

/// Name of the file.
pub const RESULTS: &str = "results.json";

/// All figures of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Results {
    /// Version of this file's form.
    pub schema_version: u32,
    /// What was answered.
    pub benchmark: Task,
    /// Which split; `mixed` where the prompts are of several.
    pub split: String,
    /// How many examples.
    pub examples: usize,
    /// How many of them were timed at batch 1.
    pub speed_examples: usize,
    /// Where.
    pub hardware: Hardware,
    /// With what.
    pub toolkit: Toolkit,
    /// What held the code of answers while it ran; none where none did.
    #[serde(default)]
    pub sandbox: Option<Vec<String>>,
    /// Per model.
    pub models: Vec<ModelResults>,
    /// Student against teacher on the same examples.
    pub paired: Vec<PairedDifference>,
    /// The resolved configuration.
    pub settings: RunSettings,
}

/// Figures of a model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ModelResults {
    /// The model.
    #[serde(flatten)]
    pub model: ModelEntry,
    /// Per strategy.
    pub strategies: Vec<StrategyResults>,
    /// Of the benchmark perplexity, which has no strategies.
    #[serde(default)]
    pub perplexity: Option<Perplexity>,
}

/// Figures of a model and a strategy.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StrategyResults {
    /// `ar`, `jacobi`, `rolling`, `multiblock` or `lookahead`.
    pub name: String,
    /// With its settings, as people read it.
    pub label: String,
    pub strategy: Strategy,
    /// 1 for `ar`.
    pub max_tokens_per_forward: usize,
    /// Answers.
    pub examples: usize,
    /// Answers that have a score.
    pub scored: usize,
    /// Right answers.
    pub correct: usize,
    /// Right of scored.
    pub accuracy: Option<f64>,
    /// Wilson's 95 % interval of it.
    pub ci95: Option<[f64; 2]>,
    /// Answers that reached the length limit.
    pub unfinished: usize,
    /// Tokens of all answers.
    pub tokens: usize,
    /// Forwards of all answers.
    pub forwards: usize,
    /// The ratio of the two.
    pub tokens_per_forward: Option<f64>,
    /// The same over the answers that ended by themselves.
    pub tokens_per_forward_finished: Option<f64>,
    /// Answers timed at batch 1; the figures from here to `end_to_end_…` are theirs, null where there are none.
    pub speed_examples: usize,
    /// Their tokens.
    pub speed_tokens: Option<usize>,
    /// Their forwards.
    pub speed_forwards: Option<usize>,
    /// Those that reached the length limit.
    pub speed_unfinished: Option<usize>,
    /// Seconds of prefill.
    pub prefill_seconds: Option<f64>,
    /// Seconds of decoding, without prefill.
    pub seconds: Option<f64>,
    /// `speed_tokens` over `seconds`.
    pub tokens_per_second: Option<f64>,
    /// The same over the answers that ended by themselves.
    pub tokens_per_second_finished: Option<f64>,
    /// Tokens per second against the teacher's autoregressive ones on the same examples.
    pub speedup_vs_teacher_ar: Option<f64>,
    /// Tokens per second against the student's autoregressive ones on the same examples.
    pub speedup_vs_student_ar: Option<f64>,
    /// `seconds` and `prefill_seconds` together.
    pub end_to_end_seconds: Option<f64>,
    /// `speed_tokens` over `end_to_end_seconds`.
    pub end_to_end_tokens_per_second: Option<f64>,
    /// Of end-to-end tokens per second.
    pub end_to_end_speedup_vs_teacher_ar: Option<f64>,
    /// Of end-to-end tokens per second.
    pub end_to_end_speedup_vs_student_ar: Option<f64>,
    /// Share of answers equal, token for token, to the same model's autoregressive ones to the same prompts.
    pub exact_match_vs_ar: Option<f64>,
    /// Among the others, where the tokens first differ: by how much the best logit is above the second. Near 0 it is rounding
    /// that chose; the median, and the largest. None at a temperature above 0.
    pub median_logit_gap_at_difference: Option<f64>,
    /// The largest of them.
    pub max_logit_gap_at_difference: Option<f64>,
    /// Tokens per second of the batched accuracy run, with prefill.
    pub batched_tokens_per_second: Option<f64>,
    /// Most GPU memory in use in the batched accuracy run, less what was in use before this model was loaded (the other
    /// model): its weights, caches and temporaries. Null on the CPU.
    pub peak_memory_bytes: Option<u64>,
    /// It over that of the same model's autoregressive decoding.
    #[serde(default)]
    pub peak_memory_over_ar: Option<f64>,
    /// Most GPU memory in use by this model and strategy at batch 1, of the longest prompt that is timed. Null on the CPU.
    #[serde(default)]
    pub speed_peak_memory_bytes: Option<u64>,
    /// It over that of the same model's autoregressive decoding.
    #[serde(default)]
    pub speed_peak_memory_over_ar: Option<f64>,
    /// Tokens that forwards made final; none for `ar`, whose forwards make one each.
    #[serde(default)]
    pub acceptance: Option<Acceptance>,
    /// Of CodeSearchNet: likeness to the references.
    #[serde(default)]
    pub similarity: Option<Similarity>,
    /// Of Spider: accuracy by the difficulty of the reference.
    #[serde(default)]
    pub by_difficulty: Option<BTreeMap<Difficulty, Accuracy>>,
}

/// How many answers are right.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Accuracy {
    /// Answers that have a score.
    pub scored: usize,
    /// Right answers.
    pub correct: usize,
    /// Right of scored.
    pub accuracy: Option<f64>,
    /// Wilson's 95 % interval of it.
    pub ci95: Option<[f64; 2]>,
}

/// Student against teacher, example by example.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PairedDifference {
    /// The student's strategy.
    pub student: String,
    /// The teacher's strategy.
    pub teacher: String,
    /// Examples that both have a score for.
    pub examples: usize,
    /// Right by the student alone.
    pub student_only: usize,
    /// Right by the teacher alone.
    pub teacher_only: usize,
    /// Student's accuracy less teacher's.
    pub difference: Option<f64>,
    /// Its 95 % interval.
    pub ci95: Option<[f64; 2]>,
    /// Of the teacher's right answers, the share that the student has right too.
    #[serde(default)]
    pub correct_kept_fraction: Option<f64>,
}

impl Results {
    /// Reads `results.json`, or that of a folder.
    ///
    /// # Errors
    /// When it is missing, no results file, or of another version.
    pub fn read(path: &Path) -> Result<Self> {
        let file = if path.is_dir() { path.join(RESULTS) } else { path.to_owned() };
        let text = std::fs::read_to_string(&file).map_err(Error::io(&file))?;
        let bad = |error| Error::file(&file, format!("is not a results.json of cllm-eval: {error}"));
        let document: Value = serde_json::from_str(&text).map_err(bad)?;
        expect_version(&file, &document)?;
        serde_json::from_value(document).map_err(bad)
    }

    /// How tokens were chosen, in words.
    pub fn choice(&self) -> String {
        match self.settings.sampling() {
            Sampling::Greedy => "greedy".to_owned(),
            Sampling::Temperature(temperature) => format!("drawn at temperature {temperature}"),
        }
    }

    /// Computes every figure.
    pub fn of(records: &Records) -> Self {
        let header = &records.header;
        let mut models: Vec<_> = header
            .models
            .iter()
            .map(|model| ModelResults {
                model: model.clone(),
                strategies: header
                    .settings
                    .strategies_of(model.role)
                    .map(|strategy| figures(records, model.role, strategy))
                    .collect(),
                perplexity: perplexity(records, model.role),
            })
            .collect();
        add_speedups(&mut models);
        models.iter_mut().for_each(add_memory_ratios);
        Results {
            schema_version: header.schema_version,
            benchmark: header.benchmark,
            split: header.split.clone(),
            examples: header.examples,
            speed_examples: header.settings.num_speed_examples.min(header.examples),
            hardware: header.hardware.clone(),
            toolkit: header.toolkit.clone(),
            sandbox: header.sandbox.clone(),
            models,
            paired: paired_differences(records),
            settings: header.settings.clone(),
        }
    }
}

fn perplexity(records: &Records, role: Role) -> Option<Perplexity> {
    Perplexity::of(&records.windows.iter().filter(|window| window.role == role).collect::<Vec<_>>())
}

fn figures(records: &Records, role: Role, strategy: Strategy) -> StrategyResults {
    let of = |strategy: Strategy| {
        records.answers.iter().filter(move |answer| answer.role == role && answer.strategy == strategy)
    };
    let answers: Vec<&AnswerRecord> = of(strategy).collect();
    let finished = |answer: &&&AnswerRecord| answer.finish_reason == FinishReason::Eos;
    let scored = answers.iter().filter(|answer| answer.verdict != Verdict::Unscored).count();
    let right = answers.iter().filter(|answer| answer.verdict == Verdict::Correct).count();
    let tokens: usize = answers.iter().map(|answer| answer.response_ids.len()).sum();
    let forwards: usize = answers.iter().map(|answer| answer.forwards).sum();
    let ended_tokens: usize = answers.iter().filter(finished).map(|answer| answer.response_ids.len()).sum();
    let ended_forwards: usize = answers.iter().filter(finished).map(|answer| answer.forwards).sum();
    let greedy: HashMap<(usize, &str), &[i32]> =
        of(Strategy::Ar).map(|answer| (asked(answer), answer.response_ids.as_slice())).collect();
    let pairs: Vec<bool> = answers
        .iter()
        .filter_map(|answer| greedy.get(&asked(answer)).map(|ids| *ids == answer.response_ids.as_slice()))
        .collect();
    let equal = pairs.iter().filter(|&&equal| equal).count();
    let mut margins: Vec<f64> = answers.iter().filter_map(|answer| answer.logit_gap_at_difference).collect();
    margins.sort_by(f64::total_cmp);
    let batch_seconds: f64 = answers.iter().map(|answer| answer.batch_prefill_seconds + answer.batch_seconds).sum();
    let found = StrategyResults {
        name: strategy.name().to_owned(),
        label: strategy.to_string(),
        strategy,
        max_tokens_per_forward: strategy.max_window_tokens(),
        examples: answers.len(),
        scored,
        correct: right,
        accuracy: ratio(right as f64, scored as f64),
        ci95: wilson(right, scored),
        unfinished: answers.iter().filter(|answer| answer.finish_reason == FinishReason::Length).count(),
        tokens,
        forwards,
        tokens_per_forward: ratio(tokens as f64, forwards as f64),
        tokens_per_forward_finished: ratio(ended_tokens as f64, ended_forwards as f64),
        exact_match_vs_ar: ratio(equal as f64, pairs.len() as f64),
        median_logit_gap_at_difference: margins.get(margins.len() / 2).copied(),
        max_logit_gap_at_difference: margins.last().copied(),
        batched_tokens_per_second: ratio(tokens as f64, batch_seconds),
        peak_memory_bytes: answers.iter().filter_map(|answer| answer.peak_memory_bytes).max(),
        acceptance: (strategy != Strategy::Ar).then(|| Acceptance::of(&answers)),
        similarity: (records.header.benchmark == Task::Codesearchnet).then(|| {
            Similarity::of(
                answers.iter().filter_map(|answer| Some((answer.text.as_str(), answer.reference.as_deref()?))),
            )
        }),
        by_difficulty: (records.header.benchmark == Task::Spider).then(|| by_difficulty(&answers)),
        speed_examples: 0,
        speed_tokens: None,
        speed_forwards: None,
        speed_unfinished: None,
        prefill_seconds: None,
        seconds: None,
        tokens_per_second: None,
        tokens_per_second_finished: None,
        speedup_vs_teacher_ar: None,
        speedup_vs_student_ar: None,
        end_to_end_seconds: None,
        end_to_end_tokens_per_second: None,
        end_to_end_speedup_vs_teacher_ar: None,
        end_to_end_speedup_vs_student_ar: None,
        peak_memory_over_ar: None,
        speed_peak_memory_bytes: None,
        speed_peak_memory_over_ar: None,
    };
    let speeds: Vec<_> =
        records.speeds.iter().filter(|speed| speed.role == role && speed.strategy == strategy).collect();
    with_speed(found, &speeds)
}

/// What tells answers to the same prompt: second turns have other prompts where the answers to the first differ.
fn asked(answer: &AnswerRecord) -> (usize, &str) {
    (answer.index, answer.prompt.as_str())
}

fn by_difficulty(answers: &[&AnswerRecord]) -> BTreeMap<Difficulty, Accuracy> {
    let mut verdicts: BTreeMap<Difficulty, Vec<bool>> = BTreeMap::new();
    for answer in answers.iter().filter(|answer| answer.verdict != Verdict::Unscored) {
        if let Some(reference) = &answer.reference {
            verdicts.entry(difficulty(reference)).or_default().push(answer.verdict == Verdict::Correct);
        }
    }
    let accuracy = |(class, verdicts): (Difficulty, Vec<bool>)| {
        let (scored, right) = (verdicts.len(), verdicts.iter().filter(|&&right| right).count());
        let accuracy = ratio(right as f64, scored as f64);
        (class, Accuracy { scored, correct: right, accuracy, ci95: wilson(right, scored) })
    };
    verdicts.into_iter().map(accuracy).collect()
}

fn with_speed(mut found: StrategyResults, speeds: &[&SpeedRecord]) -> StrategyResults {
    if speeds.is_empty() {
        return found;
    }
    let tokens: usize = speeds.iter().map(|speed| speed.tokens).sum();
    let seconds: f64 = speeds.iter().map(|speed| speed.seconds).sum();
    let prefill: f64 = speeds.iter().map(|speed| speed.prefill_seconds).sum();
    let ended = || speeds.iter().filter(|speed| speed.finish_reason == FinishReason::Eos);
    let ended_tokens: usize = ended().map(|speed| speed.tokens).sum();
    let ended_seconds: f64 = ended().map(|speed| speed.seconds).sum();
    found.speed_examples = speeds.len();
    found.speed_tokens = Some(tokens);
    found.speed_forwards = Some(speeds.iter().map(|speed| speed.forwards).sum());
    found.speed_unfinished = Some(speeds.len() - ended().count());
    found.prefill_seconds = Some(prefill);
    found.seconds = Some(seconds);
    found.tokens_per_second = ratio(tokens as f64, seconds);
    found.tokens_per_second_finished = ratio(ended_tokens as f64, ended_seconds);
    found.end_to_end_seconds = Some(seconds + prefill);
    found.end_to_end_tokens_per_second = ratio(tokens as f64, seconds + prefill);
    found.speed_peak_memory_bytes = speeds.iter().filter_map(|speed| speed.peak_memory_bytes).max();
    found
}

/// Speed-ups are ratios of tokens per second, so they do not reward a model for short answers.
fn add_speedups(models: &mut [ModelResults]) {
    let baseline = |models: &[ModelResults], role: Role| {
        let model = models.iter().find(|results| results.model.role == role)?;
        let ar = model.strategies.iter().find(|found| found.strategy == Strategy::Ar)?;
        Some((ar.tokens_per_second?, ar.end_to_end_tokens_per_second?))
    };
    let teacher = baseline(models, Role::Teacher);
    let student = baseline(models, Role::Student);
    for found in models.iter_mut().flat_map(|model| &mut model.strategies) {
        let (decode, whole) = (found.tokens_per_second, found.end_to_end_tokens_per_second);
        found.speedup_vs_teacher_ar = ratio(decode, teacher.map(|(decode, _)| decode));
        found.speedup_vs_student_ar = ratio(decode, student.map(|(decode, _)| decode));
        found.end_to_end_speedup_vs_teacher_ar = ratio(whole, teacher.map(|(_, whole)| whole));
        found.end_to_end_speedup_vs_student_ar = ratio(whole, student.map(|(_, whole)| whole));
    }
}

/// Memory against that of the model's own autoregressive decoding.
fn add_memory_ratios(model: &mut ModelResults) {
    let float = |bytes: Option<u64>| bytes.map(|bytes| bytes as f64);
    let ar = model.strategies.iter().find(|found| found.strategy == Strategy::Ar);
    let batched = float(ar.and_then(|ar| ar.peak_memory_bytes));
    let alone = float(ar.and_then(|ar| ar.speed_peak_memory_bytes));
    for found in &mut model.strategies {
        found.peak_memory_over_ar = ratio(float(found.peak_memory_bytes), batched);
        found.speed_peak_memory_over_ar = ratio(float(found.speed_peak_memory_bytes), alone);
    }
}

/// Each strategy of the student against the teacher's autoregressive answers, or the same strategy's where the teacher
/// has none.
fn paired_differences(records: &Records) -> Vec<PairedDifference> {
    let header = &records.header;
    let has = |role: Role| header.models.iter().any(|model| model.role == role);
    if !has(Role::Teacher) || !has(Role::Student) {
        return Vec::new();
    }
    let verdicts = |role: Role, strategy: Strategy| -> HashMap<usize, bool> {
        records
            .answers
            .iter()
            .filter(|answer| answer.role == role && answer.strategy == strategy)
            .filter(|answer| answer.verdict != Verdict::Unscored)
            .map(|answer| (answer.index, answer.verdict == Verdict::Correct))
            .collect()
    };
    let settings = &header.settings;
    settings
        .strategies_of(Role::Student)
        .map(|strategy| {
            let other = if settings.strategies.contains(&Strategy::Ar) { Strategy::Ar } else { strategy };
            let teacher = verdicts(Role::Teacher, other);
            let pairs: Vec<(bool, bool)> = verdicts(Role::Student, strategy)
                .into_iter()
                .filter_map(|(index, right)| Some((right, *teacher.get(&index)?)))
                .collect();
            let student_only = pairs.iter().filter(|&&pair| pair == (true, false)).count();
            let teacher_only = pairs.iter().filter(|&&pair| pair == (false, true)).count();
            let both = pairs.iter().filter(|&&pair| pair == (true, true)).count();
            PairedDifference {
                student: strategy.to_string(),
                teacher: other.to_string(),
                examples: pairs.len(),
                student_only,
                teacher_only,
                difference: ratio(student_only as f64 - teacher_only as f64, pairs.len() as f64),
                ci95: paired(student_only, teacher_only, pairs.len()),
                correct_kept_fraction: ratio(both as f64, (both + teacher_only) as f64),
            }
        })
        .collect()
}
