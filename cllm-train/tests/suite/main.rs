//! Tests of cllm-train.

mod packed;
mod program;
mod runs;
