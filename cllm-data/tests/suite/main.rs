//! `cllm-data` from the outside: its verbs on a tiny teacher with random weights.
#![allow(clippy::unwrap_used)]

mod augment;
mod bad_input;
mod clean;
mod collect;
mod damage;
mod fixtures;
mod held_folders;
mod help;
mod inspect;
mod interrupted;
mod prepare;
mod reference_format;
mod rendering;
mod rewrite;
mod scoring;
mod stats;
mod thinking;
mod torture;
mod validate;
