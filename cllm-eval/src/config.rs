//! Settings of `cllm-eval run`.

use std::path::PathBuf;

use cllm_core::decode::{Sampling, Strategy};
use cllm_core::task::{Scorer, Task};
use garde::Validate;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::role::Role;

/// Settings of an evaluation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Validate, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct RunSettings {
    /// Folder or id of the model before consistency training.
    #[garde(skip)]
    pub teacher: Option<String>,
    /// Folder or id of the model after it.
    #[garde(skip)]
    pub student: Option<String>,
    /// What to answer: one of `cllm-eval ls`. Without it, what the sources of `prompts` name, or else synthetic.
    #[garde(skip)]
    pub benchmark: Option<Task>,
    /// Folder (for jsonl: file; for perplexity: either) with the benchmark's data; synthetic needs none.
    #[garde(skip)]
    pub data: Option<PathBuf>,
    /// Which split. Without it, that of `prompts`, or else test.
    #[garde(length(min = 1))]
    pub split: Option<String>,
    /// Runs the Python code in answers to humaneval and mbpp to score it; without this they stay unscored. A model wrote that code:
    /// it runs in a sandbox without files, network and other processes (docs/sandbox.md).
    #[garde(skip)]
    pub execute_code: bool,
    /// A prompt-set file to take instead of a benchmark's files; its prompts are all of one benchmark.
    #[garde(skip)]
    pub prompts: Option<PathBuf>,
    /// Of jsonl: when an answer is right. Without it, where the texts or the numbers are equal; a row's own `meta.scorer` wins.
    #[garde(skip)]
    pub scorer: Option<Scorer>,
    /// Seed of the synthetic problems, of the first guesses and of what is drawn.
    #[garde(skip)]
    pub seed: u64,
    /// Number of synthetic problems.
    #[garde(range(min = 1))]
    pub num_problems: usize,
    /// Takes only the first examples (of mt-bench: questions, of two turns each).
    #[garde(range(min = 1))]
    pub limit: Option<usize>,
    /// How many examples, spread evenly over all, are timed at batch 1; 0 measures accuracy alone.
    #[garde(skip)]
    pub num_speed_examples: usize,
    /// How to decode (perplexity decodes nothing), such as `ar`, `jacobi: {n: 16}`, `rolling: {n: 16, pool: 4}` or `lookahead: {}`; what a strategy leaves out has its default.
    #[garde(length(min = 1), custom(valid_strategies))]
    pub strategies: Vec<Strategy>,
    /// 0 takes the likeliest token; above it, tokens are drawn from the softmax of the logits over it, the same ones with every
    /// strategy.
    #[garde(range(min = 0.0, max = 10.0))]
    pub temperature: f64,
    /// Most tokens of an answer.
    #[garde(range(min = 1))]
    pub max_new_tokens: usize,
    /// Answers generated together when accuracy is measured.
    #[garde(range(min = 1))]
    pub batch_size: usize,
    /// auto, cpu, cuda or cuda:N.
    #[garde(skip)]
    pub device: String,
    /// Folder for results.json, samples.jsonl and config.yaml.
    #[garde(skip)]
    pub output: PathBuf,
    /// Ids that end an answer, in place of the model's own.
    #[garde(skip)]
    pub eos_ids: Option<Vec<i32>>,
}

impl Default for RunSettings {
    fn default() -> Self {
        RunSettings {
            teacher: None,
            student: None,
            benchmark: None,
            data: None,
            split: None,
            execute_code: false,
            prompts: None,
            scorer: None,
            seed: 0,
            num_problems: 500,
            limit: None,
            num_speed_examples: 50,
            strategies: vec![Strategy::Ar, Strategy::Jacobi { n: 16 }],
            temperature: 0.0,
            max_new_tokens: 256,
            batch_size: 32,
            device: "auto".to_owned(),
            output: PathBuf::from("runs/eval"),
            eos_ids: None,
        }
    }
}

impl RunSettings {
    /// What `temperature` says.
    pub fn sampling(&self) -> Sampling {
        Sampling::from_temperature(self.temperature)
    }

    /// What a model is asked to do: a student guesses for its teacher, nobody guesses for it.
    pub fn strategies_of(&self, role: Role) -> impl Iterator<Item = Strategy> + '_ {
        self.strategies.iter().copied().filter(move |strategy| role == Role::Teacher || !strategy.needs_draft_model())
    }
}

pub(crate) fn valid_strategies(strategies: &[Strategy], _: &()) -> garde::Result {
    for (index, strategy) in strategies.iter().enumerate() {
        strategy.check().map_err(garde::Error::new)?;
        if strategies[..index].contains(strategy) {
            return Err(garde::Error::new("a strategy stands twice"));
        }
    }
    Ok(())
}
