//! While a command writes into a folder, no other one does.

use std::path::Path;

use cllm_core::output_folder::{lock, lock_new};
use cllm_testing::programs::path;
use cllm_train::settings::Settings;

use crate::setup::{TRAIN, prepare, settings_file, sft};

#[test]
fn no_verb_writes_into_a_folder_that_another_command_holds() {
    let dir = tempfile::tempdir().unwrap();
    prepare(dir.path());
    let settings = Settings { max_steps: Some(1), ..sft(dir.path(), "run") };
    let file = settings_file(dir.path(), &settings);
    let process = format!("(process {})", std::process::id());
    let said = ["another command", &process, "is writing into this folder"];
    let refused = |verb: &[&str]| TRAIN.fail(verb, 2, &said);

    let held = lock(&settings.output).unwrap();
    refused(&["run", "-c", &file]);
    drop(held);
    TRAIN.succeed(&["run", "-c", &file]);
    let (run, model) = (settings.output.display().to_string(), path(&settings.output, "final"));
    let held = lock(&settings.output).unwrap();
    refused(&["prune", &run]);
    drop(held);

    let prompts = path(dir.path(), "prompts.jsonl");
    let output = path(dir.path(), "output");
    let (into, from, asked) =
        (format!("output={output}"), format!("model={model}"), format!("collect.prompts={prompts}"));
    let held = lock(Path::new(&output)).unwrap();
    refused(&["rounds", &into, &from, &asked, "rounds=[{}]"]);
    refused(&["tokenizer", &prompts, "--output", &output]);
    drop(held);
    let held = lock_new(Path::new(&output)).unwrap();
    refused(&["init", "shape=qwen3-8b", &into]);
    refused(&["convert", "model.gguf", &output]);
    refused(&["export", &model, "--output", &output]);
    drop(held);
    TRAIN.succeed(&["export", &model, "--output", &output]);
    let names = std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let hidden: Vec<_> = names.filter(|name| name.starts_with('.')).collect();
    assert_eq!(hidden, Vec::<String>::new(), "no lock is left");
}
