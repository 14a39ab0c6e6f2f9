//! Settings of `clean`.

use std::path::PathBuf;

use cllm_core::chat_template::RenderSettings;
use cllm_core::settings;
use garde::Validate;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, Serialize, Deserialize, Validate, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// The data set to clean.
    #[garde(custom(settings::required_path))]
    pub input: PathBuf,
    /// Folder of the cleaned data set.
    #[garde(custom(settings::required_path))]
    pub output: PathBuf,
    /// The model whose tokenizer decodes the responses: a folder, or an id in the Hugging Face
    /// cache.
    #[garde(length(min = 1))]
    pub model: String,
    /// Folder of the benchmark's files, for tasks that need them to score answers (Spider's
    /// databases).
    #[garde(skip)]
    pub data: Option<PathBuf>,
    /// Drop responses in which one token occurs at least this many times in a row.
    #[garde(range(min = 2))]
    pub token_run: usize,
    /// Drop responses in which more than this fraction of the 4-grams repeat an earlier one.
    #[garde(range(min = 0.0, max = 1.0))]
    pub repeated_4grams: f64,
    /// Drop responses that end in at least this many copies of one sequence of tokens.
    #[garde(range(min = 2))]
    pub periodic_tail: usize,
    /// Drop responses in which one line or sentence occurs at least this many times among 64 of
    /// them in a row.
    #[garde(range(min = 2))]
    pub repeated_sentence: usize,
    /// Drop responses that reached the length limit. Those that reached it inside a thought are
    /// counted apart.
    #[garde(skip)]
    pub drop_unfinished: bool,
    /// Drop responses that the task scores as incorrect.
    #[garde(skip)]
    pub drop_incorrect: bool,
    /// Prompt sets of evaluations; drop rows that have one of their prompts, with
    /// whatever system message.
    #[garde(skip)]
    pub evaluation_prompts: Vec<PathBuf>,
    /// Save the dropped rows in dropped.jsonl.
    #[garde(skip)]
    pub keep_dropped: bool,
    /// How `evaluation_prompts` are rendered: as the prompts of the data set were.
    #[garde(dive)]
    #[serde(flatten)]
    pub rendering: RenderSettings,
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            input: PathBuf::new(),
            output: PathBuf::new(),
            model: String::new(),
            data: None,
            token_run: 10,
            repeated_4grams: 0.6,
            periodic_tail: 3,
            repeated_sentence: 3,
            drop_unfinished: true,
            drop_incorrect: false,
            evaluation_prompts: Vec::new(),
            keep_dropped: false,
            rendering: RenderSettings::default(),
        }
    }
}
