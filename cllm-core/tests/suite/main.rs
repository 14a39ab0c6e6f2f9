//! Tests across modules, in one binary.
#![allow(clippy::unwrap_used)] // A test that cannot go on fails.

mod bad_models;
mod chat_templates;
mod decoding;
mod draft_adapters;
mod fuzz;
mod handed_answers;
mod lora;
mod models;
mod needs_gpu;
mod odd_models;
mod parity;
mod prompt_forms;
mod sampling;
mod saved;
mod tokenizers;
mod trajectories;
