//! Settings of `cllm-eval run`.

use std::path::{Path, PathBuf};

use cllm_core::Error;
use cllm_core::chat_template::RenderSettings;
use cllm_core::decode::{Sampling, Strategy};
use cllm_core::task::{Scorer, Task};
use garde::Validate;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Validate, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct RunSettings {
    /// Folder or id of the model before consistency training.
    #[garde(skip)]
    pub teacher: Option<String>,
    /// Folder or id of the model after consistency training.
    #[garde(skip)]
    pub student: Option<String>,
    /// Benchmark to answer, one of `cllm-eval ls`. Default: the one that the sources of `prompts`
    /// name, or else synthetic.
    #[garde(skip)]
    pub benchmark: Option<Task>,
    /// Folder with the benchmark's data. jsonl takes a file, perplexity a file or a folder,
    /// synthetic nothing.
    #[garde(skip)]
    pub data: Option<PathBuf>,
    /// Split to answer. Default: that of `prompts`, or else test.
    #[garde(length(min = 1))]
    pub split: Option<String>,
    /// Run the Python code in answers to humaneval and mbpp to score it; otherwise they stay
    /// unscored. A model wrote that code, so it runs in a sandbox without files, network or other
    /// processes (docs/sandbox.md).
    #[garde(skip)]
    pub execute_code: bool,
    /// For spider: compare the results of the queries with their `DISTINCT`. By default it is
    /// removed from both, as Spider's official judge does. results.json has both accuracies.
    #[garde(skip)]
    pub keep_distinct: bool,
    /// Prompt set to answer instead of a benchmark's own files, in any form that `cllm-data prepare
    /// jsonl` reads. All its prompts must be of one benchmark.
    #[garde(skip)]
    pub prompts: Option<PathBuf>,
    /// System message to put before each prompt that is a conversation without one. Default: none.
    #[garde(length(min = 1))]
    pub system: Option<String>,
    /// For jsonl: when an answer is correct. Default: if the texts or the numbers are equal to
    /// those of the reference. `meta.scorer` of a row overrides it.
    #[garde(skip)]
    pub scorer: Option<Scorer>,
    /// Seed of the synthetic problems, of the first draft tokens and of sampling.
    #[garde(skip)]
    pub seed: u64,
    /// Number of synthetic problems.
    #[garde(range(min = 1, max = 10_000_000))]
    pub num_problems: usize,
    /// Use only the first N examples (for mt-bench: questions, which have two turns each).
    #[garde(range(min = 1))]
    pub limit: Option<usize>,
    /// Number of examples to time at batch 1, spread evenly over all; 0 measures only accuracy.
    #[garde(skip)]
    pub num_speed_examples: usize,
    /// Numbers of answers to decode at once, such as [1, 8, 32, 128], at which to time continuous
    /// batching of the speed examples: at most as many as these. Others can be added to a finished
    /// run. Default: none.
    #[garde(custom(valid_concurrency))]
    pub concurrency: Vec<usize>,
    /// How to decode, such as `ar`, `jacobi: {n: 16}`, `rolling: {n: auto}` or `lookahead:
    /// {}`. Settings that a strategy leaves out have their defaults. Perplexity decodes nothing.
    #[garde(length(min = 1), custom(valid_strategies))]
    pub strategies: Vec<Strategy>,
    /// 0 chooses the likeliest token. Above 0, tokens are sampled from the softmax of the logits
    /// divided by it; every strategy samples the same tokens.
    #[garde(range(min = 0.0, max = 10.0))]
    pub temperature: f64,
    /// Maximum number of tokens in an answer.
    #[garde(range(min = 1, max = 1_048_576))]
    pub max_new_tokens: usize,
    /// For thinking models: maximum number of tokens in the thought before an answer. An answer of
    /// this length that is still inside its thought gets the text `\n</think>\n\n`, and goes on from
    /// there. Default: no limit.
    #[garde(range(min = 1, max = 1_048_576))]
    pub max_thinking_tokens: Option<usize>,
    /// Number of answers decoded at once to measure accuracy.
    #[garde(range(min = 1, max = 65_536))]
    pub batch_size: usize,
    /// auto, cpu, cuda or cuda:N.
    #[garde(skip)]
    pub device: String,
    /// Folder to write results.json, samples.jsonl and config.yaml to.
    #[garde(skip)]
    pub output: PathBuf,
    /// Ids that end an answer, instead of the model's own.
    #[garde(skip)]
    pub eos_ids: Option<Vec<i32>>,
    /// How prompts are rendered.
    #[garde(dive)]
    #[serde(flatten)]
    pub rendering: RenderSettings,
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
            keep_distinct: false,
            prompts: None,
            system: None,
            scorer: None,
            seed: 0,
            num_problems: 500,
            limit: None,
            num_speed_examples: 50,
            concurrency: Vec::new(),
            strategies: vec![Strategy::Ar, Strategy::rolling(16)],
            temperature: 0.0,
            max_new_tokens: 256,
            max_thinking_tokens: None,
            batch_size: 32,
            device: "auto".to_owned(),
            output: PathBuf::from("runs/eval"),
            eos_ids: None,
            rendering: RenderSettings::default(),
        }
    }
}

impl RunSettings {
    /// Says in which file or folder of prompts an error was found.
    pub(crate) fn in_prompts(&self, error: Error) -> Error {
        match self.prompts.as_ref().or(self.data.as_ref()) {
            Some(path) => error.in_file(path),
            None => error,
        }
    }

    /// The settings by which answers are scored. The verb `score` changes them afterwards.
    pub(crate) fn scoring(&self) -> (Option<&Path>, bool, bool) {
        (self.data.as_deref(), self.execute_code, self.keep_distinct)
    }

    /// The settings that must be unchanged for a run to resume: all but the output folder, the
    /// numbers of rows that are timed, each for itself, and those of scoring.
    pub(crate) fn of_run(&self) -> RunSettings {
        RunSettings {
            output: PathBuf::new(),
            concurrency: Vec::new(),
            data: None,
            execute_code: false,
            keep_distinct: false,
            ..self.clone()
        }
    }

    pub fn sampling(&self) -> Sampling {
        Sampling::from_temperature(self.temperature)
    }

    /// What a run answered, as reports call it: a user's own file by its name, a benchmark by its
    /// name and split.
    pub fn title(&self, benchmark: Task, split: &str) -> String {
        let file = self.prompts.as_ref().or(self.data.as_ref()).filter(|_| benchmark == Task::Jsonl);
        match file.and_then(|path| path.file_name()) {
            Some(name) if split == benchmark.name() => name.display().to_string(),
            Some(name) => format!("{} / {split}", name.display()),
            None => format!("{} / {split}", benchmark.name()),
        }
    }
}

fn valid_concurrency(concurrency: &[usize], _: &()) -> garde::Result {
    for (index, rows) in concurrency.iter().enumerate() {
        if *rows == 0 {
            return Err(garde::Error::new("0 rows answer nothing; set each number to at least 1"));
        }
        if concurrency[..index].contains(rows) {
            return Err(garde::Error::new(format!("{rows} is listed twice")));
        }
    }
    Ok(())
}

pub(crate) fn valid_strategies(strategies: &[Strategy], _: &()) -> garde::Result {
    for (index, strategy) in strategies.iter().enumerate() {
        strategy.check().map_err(garde::Error::new)?;
        if strategies[..index].contains(strategy) {
            return Err(garde::Error::new(format!("strategy `{strategy}` is listed twice")));
        }
    }
    Ok(())
}
