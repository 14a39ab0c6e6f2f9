//! Settings of `collect`.

use std::path::PathBuf;

use cllm_core::chat_template::RenderSettings;
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
    #[garde(range(min = 1, max = 1_048_576))]
    pub max_new_tokens: usize,
    /// For thinking models: maximum number of tokens in the thought before an answer, a multiple of
    /// `n`. A response of this length that is still inside its thought gets the text
    /// `\n</think>\n\n`, and goes on from there. Default: no limit.
    #[garde(range(min = 1, max = 1_048_576), custom(whole_blocks(self.n)))]
    pub max_thinking_tokens: Option<usize>,
    /// Seed of the first draft tokens.
    #[garde(skip)]
    pub seed: u64,
    /// auto, cpu, cuda or cuda:N.
    #[garde(skip)]
    pub device: String,
    /// Number of responses decoded at once. An interrupted run loses at most these.
    #[garde(range(min = 1, max = 65_536))]
    pub batch_size: usize,
    /// Responses per shard.
    #[garde(range(min = 1, max = 1_048_576))]
    pub rows_per_shard: usize,
    /// Use only the first N prompts.
    #[garde(range(min = 1))]
    pub limit: Option<usize>,
    /// Token ids that end a response, in place of the model's own. The first ends references.
    #[garde(length(min = 1))]
    pub eos_ids: Option<Vec<i32>>,
    /// How prompts are rendered.
    #[garde(dive)]
    #[serde(flatten)]
    pub rendering: RenderSettings,
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
            max_thinking_tokens: None,
            seed: 0,
            device: "auto".to_owned(),
            batch_size: 64,
            rows_per_shard: 1024,
            limit: None,
            eos_ids: None,
            rendering: RenderSettings::default(),
        }
    }
}

/// Checks that a thought which is closed at its limit consists of whole blocks.
fn whole_blocks(n: usize) -> impl Fn(&Option<usize>, &()) -> garde::Result {
    move |max_thinking_tokens, ()| match *max_thinking_tokens {
        Some(max) if n > 0 && !max.is_multiple_of(n) => {
            let (below, above) = (max / n * n, max.next_multiple_of(n));
            let nearest = if below > 0 { format!("{below} or {above}") } else { above.to_string() };
            Err(garde::Error::new(format!("must be a multiple of n={n}, such as {nearest}")))
        }
        _ => Ok(()),
    }
}
