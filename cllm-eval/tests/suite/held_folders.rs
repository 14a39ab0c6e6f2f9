//! While a command writes into a folder, no other one does.

use std::path::Path;

use cllm_core::atomic_file;
use cllm_core::output_folder::lock;
use cllm_eval::records::SAMPLES;
use cllm_eval::results::{RESULTS, Results};
use cllm_testing::programs::{Program, path};

use crate::made_up::{model, records};

const EVAL: Program = Program("cllm-eval");

#[test]
fn no_verb_writes_into_a_folder_that_another_command_holds() {
    let dir = tempfile::tempdir().unwrap();
    let (teacher, output) = (path(dir.path(), "teacher"), path(dir.path(), "output"));
    model(Path::new(&teacher), 1);
    records().write(&Path::new(&output).join(SAMPLES)).unwrap();
    atomic_file::write_json(&Path::new(&output).join(RESULTS), &Results::from_records(&records())).unwrap();
    let (asked, into, data) =
        (format!("teacher={teacher}"), format!("output={output}"), format!("data={}", dir.path().display()));
    let _held = lock(Path::new(&output)).unwrap();
    for verb in [
        vec!["run", &asked, &into, "num_problems=1", "device=cpu"],
        vec!["suite", &asked, &into, &data, "device=cpu"],
        vec!["score", &output],
        vec!["report", &output],
    ] {
        EVAL.fail(&verb, 2, &["output: another command", "is writing into this folder"]);
    }
}
