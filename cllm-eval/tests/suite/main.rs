//! Tests of `cllm-eval`: its arithmetic on made-up records, its files, its exit codes.
#![allow(clippy::unwrap_used)]

mod bad_input;
mod bench;
mod interrupted;
mod made_up;
mod program;
#[path = "../../../cllm-core/tests/shared/programs.rs"]
mod programs;
mod reports;
mod results;
mod scoring;
mod suite;
