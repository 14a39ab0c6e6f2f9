//! Settings of `collect`.

use std::path::PathBuf;

use cllm_core::settings;
use garde::Validate;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, Serialize, Deserialize, Validate, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// The teacher: a folder, or an id in the Hugging Face cache.
    #[garde(length(min = 1))]
    pub model: String,
    /// The prompt set.
    #[garde(custom(settings::required_path))]
    pub prompts: PathBuf,
    /// Folder of the data set.
    #[garde(custom(settings::required_path))]
    pub output: PathBuf,
    /// Folder of the benchmark's files, for tasks that need them to score answers (Spider's
    /// databases).
    #[garde(skip)]
    pub data: Option<PathBuf>,
    /// Tokens per block.
    #[garde(range(min = 2, max = 1024))]
    pub n: usize,
    /// Maximum number of tokens in a response.
    #[garde(range(min = 1))]
    pub max_new_tokens: usize,
    /// Seed of the first draft tokens.
    #[garde(skip)]
    pub seed: u64,
    /// auto, cpu, cuda or cuda:N.
    #[garde(skip)]
    pub device: String,
    /// Number of responses decoded at once. An interrupted run loses at most these.
    #[garde(range(min = 1))]
    pub batch_size: usize,
    /// Responses per shard.
    #[garde(range(min = 1))]
    pub rows_per_shard: usize,
    /// Use only the first N prompts.
    #[garde(range(min = 1))]
    pub limit: Option<usize>,
    /// Token ids that end a response, in place of the model's own.
    #[garde(length(min = 1))]
    pub eos_ids: Option<Vec<i32>>,
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            model: String::new(),
            prompts: PathBuf::new(),
            output: PathBuf::new(),
            data: None,
            n: 16,
            max_new_tokens: 256,
            seed: 0,
            device: "auto".to_owned(),
            batch_size: 64,
            rows_per_shard: 1024,
            limit: None,
            eos_ids: None,
        }
    }
}
