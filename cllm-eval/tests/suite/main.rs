//! Tests of `cllm-eval`: its arithmetic on made-up records, its files, its exit codes.
#![allow(clippy::unwrap_used)]

mod made_up;
mod program;
mod reports;
mod results;
