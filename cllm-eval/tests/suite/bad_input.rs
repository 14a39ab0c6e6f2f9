//! Messages and exit codes for bad input, for folders that cannot be written and for devices that
//! do not exist.

use std::fs;
use std::path::Path;

use cllm_core::thought::Thought;
use serde_json::json;

use crate::made_up::{model, records};
use cllm_testing::programs::{Program, damaged_models, path, unwritable_path};

const EVAL: Program = Program("cllm-eval");

/// Arguments of a short run of these models.
fn short(teacher: &str, student: &str, output: &str) -> Vec<String> {
    let mut arguments =
        ["run", "num_problems=3", "max_new_tokens=6", "num_speed_examples=1", "device=cpu"].map(str::to_owned).to_vec();
    arguments.extend([format!("teacher={teacher}"), format!("student={student}"), format!("output={output}")]);
    arguments
}

#[test]
fn every_damaged_model_is_named_before_anything_is_answered() {
    let dir = tempfile::tempdir().unwrap();
    let (good, output) = (dir.path().join("good"), path(dir.path(), "output"));
    model(&good, 1);
    let whole = good.display().to_string();
    for (damaged, parts) in damaged_models(&good, dir.path()) {
        EVAL.fail(&short(&damaged, &whole, &output), 2, &parts);
        // A student that cannot be read ends the run before the teacher has worked for hours.
        EVAL.fail(&short(&whole, &damaged, &output), 2, &parts);
        EVAL.fail(&["generate", "2 + 2?", "--device", "cpu", "--model", &damaged], 2, &parts);
        assert!(!Path::new(&output).exists(), "{damaged}");
    }
    EVAL.fail(&short("no/such/model", &whole, &output), 2, &["no/such/model", "no such"]);
}

#[test]
fn a_prompt_longer_than_the_context_is_named_before_anything_is_answered() {
    let dir = tempfile::tempdir().unwrap();
    let (good, output, prompts) = (path(dir.path(), "good"), path(dir.path(), "output"), path(dir.path(), "p.jsonl"));
    model(Path::new(&good), 1);
    let row = |id: &str, text: &str| json!({ "id": id, "source": "jsonl/test", "prompt": text }).to_string() + "\n";
    fs::write(&prompts, row("short", "3+4") + &row("long", &"apples ".repeat(400))).unwrap();
    let arguments = [&short(&good, &good, &output)[..], &[format!("prompts={prompts}")]].concat();
    EVAL.fail(&arguments, 2, &["p.jsonl: sample `long`", "context of 1024", "leave the sample out"]);
    let given = |key: &str| [&short(&good, &good, &output)[..], &[key.to_owned()]].concat();
    EVAL.fail(&given("max_new_tokens=1000000"), 2, &["context of 1024", "lower max_new_tokens"]);
    EVAL.fail(&given("max_new_tokens=18446744073709551615"), 2, &["max_new_tokens", "greater than 1048576"]);
    EVAL.fail(&given("eos_ids=[999]"), 2, &["eos_ids: 999", "0 to 299"]);
    EVAL.fail(&given("prompts=no/such.jsonl"), 2, &["no/such.jsonl", "there is no such file"]);
    EVAL.fail(&given("benchmark=gsm8k"), 2, &["gsm8k needs `data`", "test.jsonl"]);
    fs::write(&prompts, json!({ "source": "gsm8k", "prompt": "3+4" }).to_string()).unwrap();
    let bare = [&arguments[..], &["benchmark=gsm8k".to_owned()]].concat();
    EVAL.fail(&bare, 2, &["its source is `gsm8k`, but `benchmark` is gsm8k", "with a split, such as gsm8k/test"]);
    assert!(!Path::new(&output).exists());
    let long = "apples ".repeat(400);
    EVAL.fail(&["generate", &long, "--device", "cpu", "--model", &good], 2, &["context of 1024"]);
    for bad in [["--n", "1"], ["--n", "1000000000000"], ["--max-new-tokens", "0"]] {
        EVAL.fail(&["generate", "2 + 2?", "--model", &good, bad[0], bad[1]], 2, &[bad[0]]);
    }
    EVAL.fail(
        &["generate", "2 + 2?", "--device", "cpu", "--model", &good, "--max-new-tokens", "18446744073709551615"],
        2,
        &["context of 1024"],
    );
}

#[test]
fn bad_settings_are_named_with_file_line_and_value() {
    let dir = tempfile::tempdir().unwrap();
    let file = path(dir.path(), "run.yaml");
    fs::write(&file, "teacher: x\nstudnet: y\n").unwrap();
    EVAL.fail(&["run", "-c", &file], 2, &["run.yaml", "line 2", "did you mean `student`"]);
    fs::write(&file, "teacher: x\nnum_problems: 0\n").unwrap();
    EVAL.fail(&["run", "-c", &file], 2, &["run.yaml, line 2: num_problems=0: lower than 1"]);
    EVAL.fail(&["run", "teacher=x", "batch_size=0"], 2, &["`batch_size=0`: lower than 1"]);
    EVAL.fail(&["run"], 2, &["nothing to evaluate", "`teacher`"]);
    let strategy = |strategy: &str| format!("strategies=[{{rolling: {{{strategy}}}}}]");
    for (settings, message) in [
        ("n: ato", "strategies[0].rolling.n: expected a whole number or auto"),
        ("n: -1", "strategies[0].rolling.n: expected a whole number or auto"),
        ("n: auto, tree: 65", "tree=65 is out of range; with n=auto, set it from 2 to 64"),
        ("n: auto, pool: 3", "pool=3 needs a number for n and no tree"),
    ] {
        EVAL.fail(&["run", "teacher=x", &strategy(settings)], 2, &[message]);
    }
}

#[test]
fn missing_devices_and_unwritable_folders_exit_with_code_3() {
    let dir = tempfile::tempdir().unwrap();
    let (good, output) = (path(dir.path(), "good"), unwritable_path(dir.path()));
    model(Path::new(&good), 1);
    let message = ["/file", "cannot be written", "choose another path"];
    EVAL.fail(&short(&good, &good, &output), 3, &message);
    EVAL.fail(&[&short(&good, &good, &output)[..], &["device=cuda:4096".to_owned()]].concat(), 3, &["`cuda:4096`"]);
    EVAL.fail(&[&short(&good, &good, &output)[..], &["device=gpu".to_owned()]].concat(), 2, &["`gpu` is unknown"]);
    EVAL.fail(&["generate", "x", "--model", &good, "--device", "cuda:4096"], 3, &["`cuda:4096`"]);
    let run = dir.path().join("run");
    fs::create_dir(&run).unwrap();
    records().write(&run.join("samples.jsonl")).unwrap();
    let run = run.display().to_string();
    EVAL.succeed(&["score", &run]);
    EVAL.fail(&["report", &run, "--output", &output], 3, &message);
    for arguments in [&["ls"][..], &["doctor", "--json"], &["completions", "bash"], &["score", &run, "--json"]] {
        EVAL.fail_on_full_stdout(arguments);
    }
}

#[test]
fn records_that_are_missing_or_cut_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().display().to_string();
    let samples = dir.path().join("samples.jsonl");
    EVAL.fail(&["score", &run], 2, &["samples.jsonl", "there is no such file"]);
    EVAL.fail(&["report", &run], 2, &["results.json", "there is no such file"]);
    records().write(&samples).unwrap();
    EVAL.succeed(&["score", &run]);
    for name in ["samples.jsonl", "results.json"] {
        let file = dir.path().join(name);
        let whole = fs::read(&file).unwrap();
        // A last line without its end was cut off when its run was killed, and is left out.
        let cut = [&whole[..whole.len() / 2], b"\n"].concat();
        fs::write(&file, &cut).unwrap();
        EVAL.fail(&["report", &run], 2, &[name]);
        if name == "samples.jsonl" {
            EVAL.fail(&["score", &run], 2, &["samples.jsonl", "line ", "is not a record"]);
        }
        assert_eq!(fs::read(&file).unwrap(), cut, "{name} is left as it was");
        fs::write(&file, &whole).unwrap();
    }
    let (mut long_thought, mut many_accepted, mut many_tokens) = (records(), records(), records());
    long_thought.answers[0].thought = Some(Thought::Forced(0..9999));
    many_accepted.answers[0].accepted = vec![u32::MAX];
    many_tokens.speeds[0].tokens = usize::MAX;
    for (absurd, problem) in [
        (long_thought, "thought is longer than the answer"),
        (many_accepted, "its forwards accepted 4294967295 tokens, and decoded 8"),
        (many_tokens, "counts are up to"),
    ] {
        absurd.write(&samples).unwrap();
        EVAL.fail(&["score", &run], 2, &["samples.jsonl: line ", problem]);
    }
}
