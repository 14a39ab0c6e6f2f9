//! `results.json`: every figure of a run, computed from its records alone.

mod document;
mod paired;
mod ratios;
mod strategy;
mod throughput;

use crate::perplexity::Perplexity;
use crate::records::{ModelEntry, Records};

pub use document::{
    Accuracy, AlternativeAccuracy, ModelResults, PairedDifference, RESULTS, Results, StrategyResults, Throughput,
    fastest, only_drafts,
};

impl Results {
    /// Computes every figure.
    pub fn from_records(records: &Records) -> Self {
        let header = &records.header;
        let mut models: Vec<_> =
            header.models.iter().map(|model| ModelResults::from_records(records, model.clone())).collect();
        ratios::add(&mut models, records);
        Results {
            schema_version: header.schema_version,
            benchmark: header.benchmark,
            split: header.split.clone(),
            examples: header.examples,
            set_aside: header.set_aside,
            speed_examples: header.settings.num_speed_examples.min(header.examples),
            hardware: header.hardware.clone(),
            toolkit: header.toolkit.clone(),
            started_on: header.started_on,
            commit: header.commit.clone(),
            sandbox: header.sandbox.clone(),
            models,
            paired: paired::differences(records),
            settings: header.settings.clone(),
        }
    }
}

impl ModelResults {
    fn from_records(records: &Records, model: ModelEntry) -> Self {
        let strategies = records.header.strategies_of(model.role);
        let windows: Vec<_> = records.windows_of(model.role).collect();
        ModelResults {
            strategies: strategies
                .map(|strategy| StrategyResults::from_records(records, model.role, strategy))
                .collect(),
            perplexity: Perplexity::from_windows(&windows),
            model,
        }
    }
}
