//! Tests of `cllm-eval`: its figures on made-up records, its files, its exit codes.
#![allow(clippy::unwrap_used)]

mod animations;
mod bad_input;
mod bench;
mod charts;
mod chat;
mod code;
mod comparisons;
mod concurrency;
mod doctor;
mod fuzz;
mod generate;
mod held_folders;
mod interrupted;
mod made_up;
mod mt_bench;
mod needs_browser;
mod own_data;
mod perplexities;
mod profiles;
mod reports;
mod results;
mod runs;
mod sandbox;
mod scoring;
mod serve;
mod serve_load;
mod server;
mod suite;
mod thinking_template;
mod torture;
mod tradeoffs;
