//! While a command writes into a folder, no other one does.

use std::path::Path;

use cllm_core::output_folder;
use cllm_testing::programs::path;

use crate::fixtures::{DATA, prompt_set, row, teacher, write_data_set};

#[test]
fn no_verb_writes_into_a_folder_that_another_command_holds() {
    let dir = tempfile::tempdir().unwrap();
    let data = write_data_set(&[row("a", &[5, 6, 7, 0])]);
    let exported = path(dir.path(), "exported.json");
    DATA.succeed(&["export", &path(data.path(), ""), "--output", &exported]);
    let output = path(dir.path(), "held");
    let (input, into, model) =
        (format!("input={}", path(data.path(), "")), format!("output={output}"), format!("model={}", teacher()));
    let prompts = format!("prompts={}", prompt_set());
    let verbs = [
        vec!["collect", &model, &prompts, &into, "n=8", "max_new_tokens=20", "device=cpu"],
        vec!["augment", &input, &into],
        vec!["clean", &input, &into, &model],
        vec!["import", &exported, "--output", &output],
    ];
    for verb in verbs {
        let held = output_folder::lock(Path::new(&output)).unwrap();
        let process = format!("(process {})", std::process::id());
        DATA.fail(&verb, 2, &["held: another command", &process, "is writing into this folder", "choose another"]);
        drop(held);
        DATA.succeed(&verb);
        std::fs::remove_dir_all(&output).unwrap();
    }
}
