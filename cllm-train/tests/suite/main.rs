//! Tests of cllm-train.
#![allow(clippy::unwrap_used)]

mod bad_input;
mod distributed;
#[path = "../../../cllm-core/tests/shared/families.rs"]
mod families;
#[path = "../../../cllm-core/tests/shared/foreign_parquet.rs"]
mod foreign_parquet;
mod gpu;
mod interrupted;
mod lora;
mod packed;
mod program;
#[path = "../../../cllm-core/tests/shared/programs.rs"]
mod programs;
mod recipes;
mod rounds;
mod runs;
