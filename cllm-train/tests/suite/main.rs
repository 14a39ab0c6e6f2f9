//! Tests of cllm-train.
#![allow(clippy::unwrap_used)]

mod packed;
mod program;
mod runs;
