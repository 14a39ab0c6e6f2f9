//! Tests of cllm-train.
#![allow(clippy::unwrap_used)]

mod bad_input;
mod distributed;
mod gguf;
mod held_folders;
mod interrupted;
mod long_answers;
mod lora;
mod needs_gpu;
mod needs_transformers;
mod packed;
mod plan;
mod program;
mod recipes;
mod rehearsal;
mod rounds;
mod runs;
mod setup;
mod torture;
mod training_state;
mod turns;
