//! Helpers for the tests of several crates: tiny models, tokenizers, and the built programs.
//!
//! A test that needs something that a machine may lack is in a module named after it: `needs_gpu`,
//! `needs_data` (the benchmarks' published files), `needs_browser` (Chromium), `needs_transformers`
//! (the Python packages torch and transformers), `needs_openai` (the Python package),
//! `needs_landlock` (a kernel that has it) or `needs_namespaces` (a kernel and a container that permit
//! them). It is `#[ignore]`d with the command that runs it, and fails if the thing is missing.
//! `scripts/test` selects these tests by module.
#![allow(clippy::unwrap_used, missing_docs)] // A test that cannot go on fails.

pub mod families;
pub mod foreign_parquet;
pub mod fuzz;
pub mod gpu;
pub mod help;
pub mod programs;
pub mod torture;

use std::path::{Path, PathBuf};

/// Trains a tokenizer of at most `vocab_size` ids on some texts and writes its files into `folder`.
pub fn train_tokenizer(texts: impl IntoIterator<Item: Into<String>>, vocab_size: usize, folder: &Path) {
    let texts: Vec<String> = texts.into_iter().map(Into::into).collect();
    cllm_train::tokenizer_training::train(&texts, vocab_size, folder).unwrap();
}

/// Gives a tokenizer the tokens `<think>` and `</think>`, as those of thinking models have them: with
/// the next free ids, and part of the decoded text.
pub fn add_thought_tokens(folder: &Path) {
    let path = folder.join("tokenizer.json");
    let mut tokenizer: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
    let max_id = |ids: &mut dyn Iterator<Item = u64>| ids.max().unwrap_or(0);
    let vocab = tokenizer["model"]["vocab"].as_object().unwrap();
    let added = tokenizer["added_tokens"].as_array().unwrap();
    let first_free =
        1 + max_id(&mut vocab.values().chain(added.iter().map(|token| &token["id"])).filter_map(|id| id.as_u64()));
    for (id, content) in (first_free..).zip(["<think>", "</think>"]) {
        let token = serde_json::json!({
            "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
            "special": false,
        });
        tokenizer["added_tokens"].as_array_mut().unwrap().push(token);
    }
    std::fs::write(&path, tokenizer.to_string()).unwrap();
}

/// The folder of a benchmark's published files, below the folder that `CLLM_DATA` names
/// (`scripts/test --data DIR`).
pub fn benchmark_data(name: &str) -> PathBuf {
    Path::new(&std::env::var_os("CLLM_DATA").expect("CLLM_DATA names the folder with the benchmarks' data")).join(name)
}
