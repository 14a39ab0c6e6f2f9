//! Prepares prompts and makes trajectory data sets: collects, augments, cleans, checks and
//! describes them.
//!
//! Each verb of `cllm-data` is a module. `cllm-train rounds` runs [`collect::collect`],
//! [`augment::augment`] and [`clean::clean`] in its own process, so these return their results and
//! leave printing to [`cli`].

pub mod augment;
pub mod clean;
pub mod cli;
pub mod collect;
mod dataset_card;
mod export;
mod import;
mod inspect;
mod prepare;
mod record_store;
mod reference_format;
mod rewrite;
mod scoring;
mod stats;
mod validate;
mod variants;
