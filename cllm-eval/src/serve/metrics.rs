//! What `/metrics` tells Prometheus.

use std::sync::atomic::AtomicU64;
use std::time::Duration;

use cllm_core::{Error, Result};
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;

type Labels = Vec<(&'static str, String)>;

/// The metrics of a server. Those of the engine have the label `model`.
pub(super) struct Metrics {
    registry: Registry,
    responses: Family<Labels, Counter>,
    pub(super) waiting: Family<Labels, Gauge>,
    pub(super) running: Family<Labels, Gauge>,
    pub(super) prompt_tokens: Family<Labels, Counter>,
    pub(super) cached_prompt_tokens: Family<Labels, Counter>,
    pub(super) tokens: Family<Labels, Counter>,
    pub(super) forwards: Family<Labels, Counter>,
    tokens_per_forward: Family<Labels, Histogram>,
    first_token_seconds: Family<Labels, Histogram>,
    token_seconds: Family<Labels, Histogram>,
    pub(super) prefix_use: Family<Labels, Gauge<f64, AtomicU64>>,
}

/// The labels of what is about a model.
pub(super) fn of_model(id: &str) -> Labels {
    vec![("model", id.to_owned())]
}

fn time_buckets() -> Histogram {
    Histogram::new(exponential_buckets(0.0005, 2.0, 18))
}

fn forward_buckets() -> Histogram {
    Histogram::new([1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0, 12.0, 16.0])
}

impl Metrics {
    pub(super) fn new() -> Self {
        let new_time_family = || Family::new_with_constructor(time_buckets as fn() -> Histogram);
        let mut metrics = Metrics {
            registry: Registry::with_prefix("cllm"),
            responses: Family::default(),
            waiting: Family::default(),
            running: Family::default(),
            prompt_tokens: Family::default(),
            cached_prompt_tokens: Family::default(),
            tokens: Family::default(),
            forwards: Family::default(),
            tokens_per_forward: Family::new_with_constructor(forward_buckets as fn() -> Histogram),
            first_token_seconds: new_time_family(),
            token_seconds: new_time_family(),
            prefix_use: Family::default(),
        };
        metrics.register();
        metrics
    }

    fn register(&mut self) {
        let registry = &mut self.registry;
        registry.register("responses", "HTTP responses by endpoint and status", self.responses.clone());
        registry.register("waiting_answers", "Answers that wait for a free row", self.waiting.clone());
        registry.register("running_answers", "Answers that are decoded", self.running.clone());
        registry.register("prompt_tokens", "Prompt tokens of admitted answers", self.prompt_tokens.clone());
        registry.register(
            "cached_prompt_tokens",
            "Prompt tokens that were taken from the prefix cache",
            self.cached_prompt_tokens.clone(),
        );
        registry.register("tokens", "Tokens decoded", self.tokens.clone());
        registry.register(
            "forwards",
            "Forwards of the answers that decoded them: tokens / forwards is tokens per forward",
            self.forwards.clone(),
        );
        registry.register(
            "tokens_per_forward",
            "Tokens per forward of finished answers",
            self.tokens_per_forward.clone(),
        );
        registry.register(
            "first_token_seconds",
            "Time from the request to its first tokens",
            self.first_token_seconds.clone(),
        );
        registry.register(
            "token_seconds",
            "Time per token of finished answers, after their first tokens",
            self.token_seconds.clone(),
        );
        registry.register("prefix_cache_use_ratio", "Part of the prefix cache that is in use", self.prefix_use.clone());
    }

    pub(super) fn count_response(&self, endpoint: &str, status: u16) {
        let labels = vec![("endpoint", endpoint.to_owned()), ("status", status.to_string())];
        self.responses.get_or_create(&labels).inc();
    }

    pub(super) fn observe_first_token(&self, model: &Labels, time: Duration) {
        self.first_token_seconds.get_or_create(model).observe(time.as_secs_f64());
    }

    /// An answer has ended, so long after its first tokens.
    pub(super) fn observe_answer(&self, model: &Labels, num_tokens: usize, num_forwards: usize, time: Duration) {
        if num_forwards == 0 {
            return;
        }
        self.tokens_per_forward.get_or_create(model).observe(num_tokens as f64 / num_forwards as f64);
        if num_forwards > 1 {
            self.token_seconds.get_or_create(model).observe(time.as_secs_f64() / (num_tokens - 1) as f64);
        }
    }

    /// The text for Prometheus.
    ///
    /// # Errors
    /// When the metrics cannot be written, which would be a bug.
    pub(super) fn text(&self) -> Result<String> {
        let mut text = String::new();
        encode(&mut text, &self.registry).map_err(Error::serialization)?;
        Ok(text)
    }
}
