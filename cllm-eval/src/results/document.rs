//! The document `results.json`, and lookups of models and strategies in it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use cllm_core::chat_template::Date;
use cllm_core::decode::Strategy;
use cllm_core::environment::{Hardware, Toolkit};
use cllm_core::task::{Metric, Task};
use cllm_core::{Error, Result, checksum};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::acceptance::Acceptance;
use crate::config::RunSettings;
use crate::perplexity::Perplexity;
use crate::records::{ModelEntry, check_version};
use crate::role::Role;
use crate::similarity::Similarity;
use crate::spider_difficulty::Difficulty;

/// Name of the file in a run's folder.
pub const RESULTS: &str = "results.json";

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Results {
    pub schema_version: u32,
    pub benchmark: Task,
    /// `mixed` if the prompts come from several splits.
    pub split: String,
    /// Number of prompts answered.
    pub examples: usize,
    /// Number of rows of the prompt set that could not be read, and are no prompts.
    #[serde(default)]
    pub set_aside: usize,
    /// Number of these prompts that were timed at batch 1.
    pub speed_examples: usize,
    pub hardware: Hardware,
    pub toolkit: Toolkit,
    /// The day on which the run was started.
    #[serde(default)]
    pub started_on: Option<Date>,
    /// The commit of the toolkit, if it was built for release in a checkout.
    #[serde(default)]
    pub commit: Option<String>,
    /// Layers of the sandbox that ran the code of answers. `None` if no code ran.
    #[serde(default)]
    pub sandbox: Option<Vec<String>>,
    pub models: Vec<ModelResults>,
    /// The student's accuracy against the teacher's on the same examples, for each strategy of the
    /// student.
    pub paired: Vec<PairedDifference>,
    /// The resolved settings.
    pub settings: RunSettings,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ModelResults {
    #[serde(flatten)]
    pub model: ModelEntry,
    pub strategies: Vec<StrategyResults>,
    /// Only for the benchmark `perplexity`, which has no strategies.
    #[serde(default)]
    pub perplexity: Option<Perplexity>,
}

/// Figures of a model with a strategy.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StrategyResults {
    /// `ar`, `jacobi`, `rolling`, `multiblock`, `lookahead`, `drafted` or `gated`.
    pub name: String,
    /// The strategy with its settings, such as `rolling n=16`.
    pub label: String,
    pub strategy: Strategy,
    /// Size of the strategy's window; 1 for `ar`.
    pub max_tokens_per_forward: usize,
    /// Number of answers.
    pub examples: usize,
    /// Number of answers with a score.
    pub scored: usize,
    /// Number of correct answers.
    pub correct: usize,
    /// `correct` divided by `scored`.
    pub accuracy: Option<f64>,
    /// Wilson's 95 % interval of the accuracy.
    pub ci95: Option<[f64; 2]>,
    /// The rule that `accuracy` counts. `None` if the benchmark has one rule.
    #[serde(default)]
    pub metric: Option<Metric>,
    /// Accuracy by the benchmark's other rule.
    #[serde(default)]
    pub alternative: Option<AlternativeAccuracy>,
    /// Number of answers that reached the length limit.
    pub unfinished: usize,
    /// Number of answers with a thought. `None` if none has one and there is no
    /// `max_thinking_tokens`.
    #[serde(default)]
    pub thoughts: Option<usize>,
    /// Number of answers whose thought never closed, which are incorrect. `None` where `thoughts` is.
    #[serde(default)]
    pub open_thoughts: Option<usize>,
    /// Number of answers whose thought was closed at `max_thinking_tokens`. `None` without that
    /// setting.
    #[serde(default)]
    pub closed_thoughts: Option<usize>,
    /// Tokens of all answers, without those that closed a thought.
    pub tokens: usize,
    /// Forwards of all answers.
    pub forwards: usize,
    pub tokens_per_forward: Option<f64>,
    /// Tokens per forward of the answers that ended on their own.
    pub tokens_per_forward_finished: Option<f64>,
    /// Number of answers timed at batch 1. The figures of speed are computed from these answers,
    /// and are null if there are none.
    pub speed_examples: usize,
    pub speed_tokens: Option<usize>,
    pub speed_forwards: Option<usize>,
    /// Tokens of one of these forwards, draft tokens included.
    #[serde(default)]
    pub mean_window_tokens: Option<f64>,
    /// How many of these forwards tried a number of draft tokens whose time was not known.
    #[serde(default)]
    pub speed_probes: Option<usize>,
    pub speed_unfinished: Option<usize>,
    pub prefill_seconds: Option<f64>,
    /// Seconds of decoding, excluding prefill.
    pub seconds: Option<f64>,
    /// `speed_tokens` divided by `seconds`.
    pub tokens_per_second: Option<f64>,
    /// Tokens per second of the answers that ended on their own.
    pub tokens_per_second_finished: Option<f64>,
    /// Tokens per second, divided by those of the teacher's autoregressive decoding on the same
    /// examples.
    pub speedup_vs_teacher_ar: Option<f64>,
    /// 95 % interval of that ratio by a bootstrap over the examples. `None` for the baseline itself.
    #[serde(default)]
    pub speedup_vs_teacher_ar_ci95: Option<[f64; 2]>,
    /// Tokens per second, divided by those of the student's autoregressive decoding on the same
    /// examples.
    pub speedup_vs_student_ar: Option<f64>,
    #[serde(default)]
    pub speedup_vs_student_ar_ci95: Option<[f64; 2]>,
    /// Seconds of prefill and decoding.
    pub end_to_end_seconds: Option<f64>,
    /// `speed_tokens` divided by `end_to_end_seconds`.
    pub end_to_end_tokens_per_second: Option<f64>,
    pub end_to_end_speedup_vs_teacher_ar: Option<f64>,
    pub end_to_end_speedup_vs_student_ar: Option<f64>,
    /// Fraction of answers with the same tokens as the same model's autoregressive answer to the
    /// same prompt.
    pub exact_match_vs_ar: Option<f64>,
    /// Median, over the other answers, of the best minus the second-best logit at the first token
    /// that differs. A gap near 0 means that rounding decided. `None` at a temperature above 0.
    pub median_logit_gap_at_difference: Option<f64>,
    pub max_logit_gap_at_difference: Option<f64>,
    /// Tokens per second of the batched accuracy run, including prefill.
    pub batched_tokens_per_second: Option<f64>,
    /// Peak GPU memory of the batched accuracy run, excluding what was in use before this model was
    /// loaded: the model's weights, caches and temporaries. Null on the CPU.
    pub peak_memory_bytes: Option<u64>,
    /// `peak_memory_bytes` divided by that of the same model's autoregressive decoding.
    #[serde(default)]
    pub peak_memory_over_ar: Option<f64>,
    /// Peak GPU memory of this model and strategy at batch 1 on the longest timed prompt. Null on
    /// the CPU.
    #[serde(default)]
    pub speed_peak_memory_bytes: Option<u64>,
    /// `speed_peak_memory_bytes` divided by that of the same model's autoregressive decoding.
    #[serde(default)]
    pub speed_peak_memory_over_ar: Option<f64>,
    /// Figures of continuous batching, from few rows to many. `None` if none is measured.
    #[serde(default)]
    pub concurrency: Option<Vec<Throughput>>,
    /// How many tokens the forwards accepted. `None` for `ar`, because its forwards accept one
    /// each.
    #[serde(default)]
    pub acceptance: Option<Acceptance>,
    /// CodeSearchNet only: similarity to the references.
    #[serde(default)]
    pub similarity: Option<Similarity>,
    /// Spider only: accuracy by difficulty of the reference query.
    #[serde(default)]
    pub by_difficulty: Option<BTreeMap<Difficulty, Accuracy>>,
}

/// Figures of continuous batching with a number of rows. They are those of the repetition with the
/// median tokens per second.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Throughput {
    /// Number of answers decoded at once. The figures for 1 are those at batch 1.
    pub concurrency: usize,
    /// Number of repetitions.
    pub repetitions: usize,
    /// Number of answers in a repetition.
    pub answers: usize,
    /// Number of answers that reached the length limit.
    pub unfinished: usize,
    pub tokens: usize,
    /// Forwards after prefill, summed over the answers.
    pub forwards: usize,
    pub tokens_per_forward: Option<f64>,
    /// Mean number of answers in progress. It is below `concurrency` because rows run empty at the
    /// end.
    pub mean_rows: Option<f64>,
    pub prefill_seconds: f64,
    /// Seconds of decoding until the last answer has ended, excluding prefill.
    pub seconds: f64,
    /// `tokens` divided by `seconds`.
    pub tokens_per_second: Option<f64>,
    /// `tokens` divided by the seconds of decoding from the admission of each answer to its end.
    pub tokens_per_second_per_user: Option<f64>,
    /// Tokens per second, divided by those of the teacher's autoregressive decoding with as many
    /// rows.
    pub speedup_vs_teacher_ar: Option<f64>,
    pub speedup_vs_student_ar: Option<f64>,
    /// Seconds of prefill and decoding.
    pub end_to_end_seconds: f64,
    pub end_to_end_tokens_per_second: Option<f64>,
    pub end_to_end_tokens_per_second_per_user: Option<f64>,
    pub end_to_end_speedup_vs_teacher_ar: Option<f64>,
    pub end_to_end_speedup_vs_student_ar: Option<f64>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Accuracy {
    /// Number of answers with a score.
    pub scored: usize,
    pub correct: usize,
    /// `correct` divided by `scored`.
    pub accuracy: Option<f64>,
    /// Wilson's 95 % interval of the accuracy.
    pub ci95: Option<[f64; 2]>,
}

/// Accuracy by the rule that the strategy's `accuracy` does not count.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AlternativeAccuracy {
    pub metric: Metric,
    #[serde(flatten)]
    pub figures: Accuracy,
}

/// Accuracy of the student against that of the teacher, paired by example.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PairedDifference {
    /// The student's strategy with its settings.
    pub student: String,
    /// The teacher's strategy with its settings.
    pub teacher: String,
    /// Number of examples for which both have a score.
    pub examples: usize,
    /// Number of examples that only the student answered correctly.
    pub student_only: usize,
    /// Number of examples that only the teacher answered correctly.
    pub teacher_only: usize,
    /// Accuracy of the student minus that of the teacher.
    pub difference: Option<f64>,
    /// 95 % interval of the difference.
    pub ci95: Option<[f64; 2]>,
    /// Fraction of the teacher's correct answers that the student also answered correctly.
    #[serde(default)]
    pub correct_kept_fraction: Option<f64>,
}

impl Results {
    /// Reads a `results.json`, given the file or its folder.
    ///
    /// # Errors
    /// When it is missing, is not a results file, or has another schema version.
    pub fn read(path: &Path) -> Result<Self> {
        let file = if path.is_dir() { path.join(RESULTS) } else { path.to_owned() };
        let bytes = std::fs::read(&file).map_err(Error::io(&file))?;
        let damaged = || {
            let message = "is damaged, or was changed: its checksum is of other contents; the same `cllm-eval run` \
                           writes it again from samples.jsonl, or remove its `checksum` if you changed it";
            Error::file(&file, message)
        };
        let text = checksum::whole_json(&bytes).ok_or_else(damaged)?;
        let invalid = |error| Error::file(&file, format!("is not a results.json of cllm-eval: {error}"));
        let document: Value = serde_json::from_str(text).map_err(invalid)?;
        check_version(&file, &document)?;
        serde_json::from_value(document).map_err(invalid)
    }

    /// Writes `results.json` into the folder of a run, and returns its path.
    ///
    /// # Errors
    /// File-system errors.
    pub fn write(&self, folder: &Path) -> Result<PathBuf> {
        let path = folder.join(RESULTS);
        checksum::write_json(&path, self)?;
        Ok(path)
    }

    pub fn model(&self, role: Role) -> Option<&ModelResults> {
        self.models.iter().find(|results| results.model.role == role)
    }

    /// Figures of every model and strategy, in the order of the file.
    pub fn strategies(&self) -> impl Iterator<Item = (Role, &StrategyResults)> {
        self.models.iter().flat_map(|model| model.strategies.iter().map(|figures| (model.model.role, figures)))
    }

    /// The strategy that represents the run: the fastest of the student, or of the only model. A
    /// draft model is represented by the teacher, which decodes with it.
    pub fn headline(&self) -> Option<(Role, &StrategyResults)> {
        let only_drafts = only_drafts(&self.strategies().collect::<Vec<_>>());
        let role = if only_drafts { Role::Teacher } else { Role::Student };
        let model = self.model(role).or(self.models.first())?;
        Some((model.model.role, model.fastest()?))
    }

    /// What speed-ups are measured against: autoregressive decoding of the teacher, or of the only
    /// model.
    pub fn baseline(&self) -> Option<(&ModelEntry, &StrategyResults)> {
        let model = self.model(Role::Teacher).or(self.models.first())?;
        Some((&model.model, model.autoregressive()?))
    }

    /// The speed-up of a strategy over the baseline, with its 95 % interval.
    pub fn speedup(&self, figures: &StrategyResults) -> (Option<f64>, Option<[f64; 2]>) {
        match self.baseline().map(|(model, _)| model.role) {
            Some(Role::Teacher) => (figures.speedup_vs_teacher_ar, figures.speedup_vs_teacher_ar_ci95),
            Some(Role::Student) => (figures.speedup_vs_student_ar, figures.speedup_vs_student_ar_ci95),
            None => (None, None),
        }
    }

    /// Figures of continuous batching of every model and strategy, from few rows to many.
    pub fn throughputs(&self) -> Vec<(Role, &StrategyResults, &Throughput)> {
        let mut throughputs: Vec<_> = self
            .strategies()
            .flat_map(|(role, figures)| figures.concurrency.iter().flatten().map(move |one| (role, figures, one)))
            .collect();
        throughputs.sort_by_key(|(_, _, throughput)| throughput.concurrency);
        throughputs
    }

    /// Describes how tokens were chosen.
    pub fn sampling(&self) -> String {
        if self.settings.sampling().is_greedy() {
            return "greedy".to_owned();
        }
        format!("sampled at temperature {}", self.settings.temperature)
    }
}

impl ModelResults {
    /// Figures of autoregressive decoding.
    pub fn autoregressive(&self) -> Option<&StrategyResults> {
        self.strategies.iter().find(|figures| figures.strategy == Strategy::Ar)
    }

    /// The fastest strategy that accepts several tokens per forward; autoregressive decoding if
    /// there is no other.
    pub fn fastest(&self) -> Option<&StrategyResults> {
        fastest(self.strategies.iter())
    }
}

/// Whether the student of these models and strategies does nothing but draft for its teacher, so that
/// its own answers are of no use.
pub fn only_drafts(strategies: &[(Role, &StrategyResults)]) -> bool {
    let has = |of_role: Role, is_meant: fn(Strategy) -> bool| {
        strategies.iter().any(|(role, figures)| *role == of_role && is_meant(figures.strategy))
    };
    has(Role::Teacher, Strategy::needs_draft_model) && !has(Role::Student, |strategy| strategy != Strategy::Ar)
}

/// The fastest of several strategies of one model. Autoregressive decoding is the baseline, so it
/// is chosen only if there is no other strategy. Speed means tokens per second if all strategies
/// are timed, otherwise tokens per forward; of equally fast strategies the last is chosen.
pub fn fastest<'r>(strategies: impl Iterator<Item = &'r StrategyResults>) -> Option<&'r StrategyResults> {
    let (ar, several): (Vec<_>, Vec<_>) = strategies.partition(|figures| figures.strategy == Strategy::Ar);
    let candidates = if several.is_empty() { ar } else { several };
    let all_timed = candidates.iter().all(|figures| figures.tokens_per_second.is_some());
    let speed = |figures: &StrategyResults| {
        if all_timed { figures.tokens_per_second } else { figures.tokens_per_forward }.unwrap_or(0.0)
    };
    candidates.into_iter().max_by(|a, b| speed(a).total_cmp(&speed(b)))
}
