//! Damaged and made-up files of every kind that models, data sets and settings have, and answers of
//! every kind that is scored.

use std::fs;
use std::path::{Path, PathBuf};

use cllm_core::chat_template::{Message, Rendering, today};
use cllm_core::checkpoint::{self, TensorFile};
use cllm_core::checksum;
use cllm_core::model::ModelConfig;
use cllm_core::prompt_set::{self, Prompt, Sample};
use cllm_core::task::{ScoreContext, Task, compared_code, synthetic};
use cllm_core::tokenizer::Tokenizer;
use cllm_core::trajectory::{FinishReason, Reader};
use cllm_testing::fuzz::fuzz;
use garde::Validate;
use serde::{Deserialize, Serialize};

fn fixtures(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// The files of this name in the folders in a folder.
fn files_named(folder: &str, name: &str) -> Vec<PathBuf> {
    let files = fs::read_dir(fixtures(folder)).unwrap().map(|entry| entry.unwrap().path().join(name));
    files.filter(|file| file.exists()).collect()
}

/// Writes inputs to a file of a folder, and gives the folder to `read`.
fn in_folder<R: Fn(&Path)>(files: &[(&str, PathBuf)], name: &str, read: R) -> impl Fn(&[u8]) + use<R> {
    let dir = tempfile::tempdir().unwrap();
    for (name, from) in files {
        fs::create_dir_all(dir.path().join(name).parent().unwrap()).unwrap();
        fs::copy(from, dir.path().join(name)).unwrap();
    }
    let file = dir.path().join(name);
    move |input| {
        fs::write(&file, input).unwrap();
        read(dir.path());
    }
}

#[test]
fn fuzz_config_json() {
    fuzz("config-json", &files_named("models", "config.json"), |input| {
        let Ok(json) = serde_json::from_slice(input) else { return };
        if let Ok(config) = ModelConfig::from_json(&json) {
            let _ = (config.num_parameters(), config.to_json("float32"));
        }
    });
}

#[test]
fn fuzz_safetensors() {
    let read = |folder: &Path| {
        let Ok(file) = TensorFile::open(&folder.join("model.safetensors"), "") else { return };
        file.tensors().for_each(|(name, tensor)| drop((tensor.num_elements(), tensor.kind(&name))));
    };
    let seeds = [fixtures("adapters/ours/adapter_model.safetensors")];
    fuzz("safetensors", &seeds, in_folder(&[], "model.safetensors", read));
}

#[test]
fn fuzz_weight_map() {
    let read = |folder: &Path| drop(checkpoint::fingerprint(folder));
    let config = fixtures("models/llama/config.json");
    let target = in_folder(&[("config.json", config)], "model.safetensors.index.json", read);
    fuzz("weight-map", &[fixtures("fuzz/weight-map")], target);
}

#[test]
fn fuzz_checksums() {
    let read = |folder: &Path| drop(checksum::check_folder(folder, ""));
    fuzz("checksums", &[fixtures("fuzz/checksums")], in_folder(&[], checksum::CHECKSUMS, read));
}

#[test]
fn fuzz_tokenizer_json() {
    let read = |folder: &Path| {
        let Ok(tokenizer) = Tokenizer::load(folder) else { return };
        if let Ok(ids) = tokenizer.encode("What is 3 + 4?\n  Größe 数") {
            let _ = tokenizer.decode(&ids);
        }
    };
    let seeds = files_named("tokenizers", "tokenizer.json");
    fuzz("tokenizer-json", &seeds, in_folder(&[], "tokenizer.json", read));
}

#[test]
fn fuzz_chat_template() {
    let tokenizer = fixtures("tokenizers/smollm/tokenizer.json");
    let read = |folder: &Path| {
        let Ok(tokenizer) = Tokenizer::load_for(folder, &Rendering::on(today())) else { return };
        let mut prompt = Prompt::question("What is 3 + 4?");
        if let Prompt::Conversation(conversation) = &mut prompt {
            conversation.messages.insert(0, Message::new("system", "Be brief."));
        }
        let _ = tokenizer.encode_prompt(&prompt);
    };
    let target = in_folder(&[("tokenizer.json", tokenizer)], "chat_template.jinja", read);
    fuzz("chat-template", &[fixtures("fuzz/chat-template")], target);
}

#[test]
fn fuzz_shards() {
    let read = |folder: &Path| {
        let Ok(reader) = Reader::open(&folder.join("rows.parquet")) else { return };
        let _ = (reader.rows().take_while(Result::is_ok).count(), reader.row_chunks());
    };
    let files = fs::read_dir(fixtures("other-tools")).unwrap().map(|entry| entry.unwrap().path());
    let seeds: Vec<PathBuf> =
        files.filter(|file| file.extension().is_some_and(|extension| extension == "parquet")).collect();
    let target = in_folder(&[("manifest.json", fixtures("other-tools/manifest.json"))], "rows.parquet", read);
    fuzz("shards", &seeds, target);
}

#[test]
fn fuzz_manifest() {
    let read = |folder: &Path| {
        if let Ok(reader) = Reader::open_incomplete(folder) {
            let _ = (reader.num_rows(), reader.rows().take_while(Result::is_ok).count());
        }
    };
    let shard = ("data/rows.parquet", fixtures("other-tools/pandas.parquet"));
    let seeds = [fixtures("other-tools/manifest.json"), fixtures("fuzz/manifest")];
    fuzz("manifest", &seeds, in_folder(&[shard], "manifest.json", read));
}

#[test]
fn fuzz_prompt_files() {
    let read = |folder: &Path| drop(prompt_set::read(&folder.join("prompts")));
    fuzz("prompt-files", &[fixtures("fuzz/prompts"), fixtures("prompt-files")], in_folder(&[], "prompts", read));
}

#[derive(Default, Serialize, Deserialize, Validate)]
#[serde(default, deny_unknown_fields)]
struct SomeSettings {
    #[garde(skip)]
    output: PathBuf,
    #[garde(range(min = 1, max = 100))]
    epochs: usize,
    #[garde(skip)]
    lr: Option<f64>,
    #[garde(skip)]
    names: Vec<String>,
}

#[test]
fn fuzz_settings() {
    let read = |folder: &Path| {
        let file = folder.join("run.yaml");
        let override_from_file = fs::read(&file).unwrap().iter().map(|&byte| char::from(byte)).take(40).collect();
        let _ = cllm_core::settings::load::<SomeSettings>(Some(&file), &[override_from_file]);
        let _ = cllm_core::settings::load::<SomeSettings>(Some(&file), &[]);
    };
    fuzz("settings", &[fixtures("fuzz/settings")], in_folder(&[], "run.yaml", read));
}

/// Scores an answer, and the answer as its own reference.
fn score(task: Task, answer: &str) {
    for reference in [answer, "#### 42", "SELECT count(*) FROM t", "42"] {
        let sample = Sample {
            id: "a".to_owned(),
            source: format!("{}/test", task.name()),
            prompt: Prompt::question("What is 40 + 2?"),
            reference: Some(reference.to_owned()),
            meta: None,
        };
        let _ = task.score(ScoreContext::default(), &sample, answer, FinishReason::Eos, false);
    }
}

#[test]
fn fuzz_numbers() {
    let target = |input: &[u8]| {
        let text = String::from_utf8_lossy(input);
        [Task::Gsm8k, Task::Jsonl, Task::Synthetic].into_iter().for_each(|task| score(task, &text));
    };
    fuzz("numbers", &[fixtures("fuzz/answers"), fixtures("text/number-answers.jsonl")], target);
}

#[test]
fn fuzz_sql_and_python_extraction() {
    let mut problems = synthetic::generate(0, "test", 10);
    // One of each kind: all others read an answer in the same way.
    problems.dedup_by_key(|sample| sample.reference.as_deref().is_some_and(|reference| reference.contains("SELECT")));
    problems.truncate(2);
    let target = |input: &[u8]| {
        let text = String::from_utf8_lossy(input);
        for sample in &problems {
            let _ = Task::Synthetic.score(ScoreContext::default(), sample, &text, FinishReason::Eos, false);
        }
        let _ = compared_code(&text, "def f():\n    return 1\n");
    };
    fuzz("extraction", &[fixtures("fuzz/answers")], target);
}
