//! Settings of `cllm-eval serve`.

use std::net::IpAddr;

use cllm_core::chat_template::RenderSettings;
use cllm_core::decode::Strategy;
use garde::Validate;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The API key is no setting: it comes from the environment variable `CLLM_API_KEY`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Validate, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ServeSettings {
    /// Folder or id of the model to serve. Requests name it like this.
    #[garde(length(min = 1))]
    pub model: String,
    /// Folder or id of a second model, decoded autoregressively, that is served beside it; for
    /// `drafted`, the model that decides. Default: the first model, decoded autoregressively, under
    /// its name with `:ar`.
    #[garde(skip)]
    pub teacher: Option<String>,
    /// How the model decodes. Default: `rolling: {n: 16}`, or `gated: {n: 16}` with adapters for draft
    /// tokens.
    #[garde(inner(custom(valid_strategy)))]
    pub strategy: Option<Strategy>,
    /// Address to listen on. Others than 127.0.0.1 are reached from other machines; set
    /// `CLLM_API_KEY` then.
    #[garde(skip)]
    pub host: IpAddr,
    /// Port to listen on; 0 for any that is free.
    #[garde(skip)]
    pub port: u16,
    /// Origins of web pages that may use the server, such as `[https://example.org]`. Default: only
    /// its own page.
    #[garde(skip)]
    pub cors_origins: Vec<String>,
    /// Maximum number of answers decoded at once.
    #[garde(range(min = 1, max = 1024))]
    pub batch_size: usize,
    /// Maximum number of answers that wait; further requests are refused (429).
    #[garde(range(max = 100_000))]
    pub max_queue: usize,
    /// Maximum number of tokens of a prompt with its answer. Default: the model's context, but at
    /// most 2048.
    #[garde(range(min = 2, max = 1_048_576))]
    pub context: Option<usize>,
    /// Maximum number of tokens in an answer if its request does not say it.
    #[garde(range(min = 1, max = 1_048_576))]
    pub max_new_tokens: usize,
    /// For thinking models: maximum number of tokens in the thought before an answer. An answer of
    /// this length that is still inside its thought gets the text `\n</think>\n\n`, and goes on from
    /// there, unless its request leaves no room for that. Default: no limit.
    #[garde(range(min = 1, max = 1_048_576))]
    pub max_thinking_tokens: Option<usize>,
    /// Temperature if a request does not say it; 0 chooses the likeliest token.
    #[garde(range(min = 0.0, max = 10.0))]
    pub temperature: f64,
    /// Maximum number of bytes of a request.
    #[garde(range(min = 1, max = 536_870_912))]
    pub max_body_bytes: usize,
    /// Maximum time for an answer, from its request on.
    #[garde(range(min = 1, max = 604_800))]
    pub timeout_seconds: u64,
    /// Maximum time to finish running answers after SIGTERM or SIGINT.
    #[garde(range(max = 604_800))]
    pub drain_seconds: u64,
    /// auto, cpu, cuda or cuda:N.
    #[garde(skip)]
    pub device: String,
    /// Ids that end an answer, instead of the model's own.
    #[garde(skip)]
    pub eos_ids: Option<Vec<i32>>,
    /// How prompts are rendered.
    #[garde(dive)]
    #[serde(flatten)]
    pub rendering: RenderSettings,
}

impl Default for ServeSettings {
    fn default() -> Self {
        ServeSettings {
            model: String::new(),
            teacher: None,
            strategy: None,
            host: IpAddr::from([127, 0, 0, 1]),
            port: 8000,
            cors_origins: Vec::new(),
            batch_size: 32,
            max_queue: 256,
            context: None,
            max_new_tokens: 256,
            max_thinking_tokens: None,
            temperature: 0.0,
            max_body_bytes: 4 << 20,
            timeout_seconds: 600,
            drain_seconds: 30,
            device: "auto".to_owned(),
            eos_ids: None,
            rendering: RenderSettings::default(),
        }
    }
}

fn valid_strategy(strategy: &Strategy, _: &()) -> garde::Result {
    strategy.check().map_err(garde::Error::new)
}
