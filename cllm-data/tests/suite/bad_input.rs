//! Error messages and exit codes for bad input, paths that cannot be written, full disks, and
//! missing devices.

use std::fs;
use std::path::Path;

use cllm_core::fingerprint;
use cllm_testing::foreign_parquet;
use cllm_testing::programs::{copy_folder, damaged_models, path, unwritable_path};
use serde_json::json;

use crate::fixtures::{DATA, collect, prompt_set, row, run_error, shard, shards, teacher, write_data_set};

/// The command line of `collect` from `model` into `output`.
fn collect_command(model: &str, output: &str) -> Vec<String> {
    let paths = [format!("model={model}"), format!("prompts={}", prompt_set()), format!("output={output}")];
    let settings = ["collect", "n=8", "max_new_tokens=20", "device=cpu", "rows_per_shard=8"].map(str::to_owned);
    [&settings[..], &paths].concat()
}

/// The command lines of all verbs that read a data set. The first three write nothing, the others
/// write `output`.
fn commands_that_read(data: &str, output: &str) -> Vec<Vec<String>> {
    let model = teacher();
    let (input, into) = (format!("input={data}"), format!("output={output}"));
    [
        vec!["validate", data],
        vec!["stats", data],
        vec!["inspect", data],
        vec!["export", data, "--output", output],
        vec!["augment", &input, &into],
        vec!["clean", &input, &into, &format!("model={model}")],
    ]
    .map(|verb| verb.into_iter().map(str::to_owned).collect())
    .into()
}

#[test]
fn every_damaged_model_is_named_and_nothing_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let data = write_data_set(&[row("a", &[5, 6, 7, 0])]);
    let (data, output) = (path(data.path(), ""), path(dir.path(), "output"));
    fs::write(dir.path().join("reference.json"), "[]").unwrap();
    for (model, parts) in damaged_models(Path::new(&teacher()), dir.path()) {
        DATA.fail(&collect_command(&model, &output), 2, &parts);
        // These verbs read only the tokenizer.
        if model.ends_with("tokenizer") {
            let (input, into) = (format!("input={data}"), format!("output={output}"));
            DATA.fail(&["clean", &input, &into, &format!("model={model}")], 2, &parts);
            DATA.fail(&["inspect", &data, "--model", &model], 2, &parts);
        }
        assert!(!Path::new(&output).exists(), "{model}");
    }
    DATA.fail(&collect_command("no/such/model", &output), 2, &["no/such/model", "no such"]);
}

#[test]
fn a_model_with_another_tokenizer_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let data = write_data_set(&[row("a", &[5, 6, 7, 0])]);
    let (data, output) = (path(data.path(), ""), path(dir.path(), "output"));
    let model = dir.path().join("model");
    copy_folder(Path::new(&teacher()), &model);
    cllm_testing::train_tokenizer(["Other words make other ids."], 290, &model);
    let model = model.display().to_string();
    let said = ["tokenizer is not that of the model", "name the model that collected it"];
    DATA.fail(&["inspect", &data, "--model", &model], 2, &said);
    let (input, into, model) = (format!("input={data}"), format!("output={output}"), format!("model={model}"));
    DATA.fail(&["clean", &input, &into, &model], 2, &said);
    assert!(!Path::new(&output).exists());
}

#[test]
fn every_bad_shard_is_named_by_every_verb_and_nothing_is_written() {
    let good = write_data_set(&[row("a", &[5, 6, 7, 0]), row("b", &[5, 6, 7, 0])]);
    type Damage = fn(&Path);
    let damages: [(Damage, &[&str]); 6] = [
        (
            |shard| {
                let bytes = fs::read(shard).unwrap();
                fs::write(shard, &bytes[..bytes.len() / 2]).unwrap();
            },
            &["part-00000.parquet", "not a complete Parquet file", "collect again"],
        ),
        (|shard| fs::remove_file(shard).unwrap(), &["part-00000.parquet", "there is no such file"]),
        (|shard| foreign_parquet::write(shard, "text", None), &["part-00000.parquet", "not a trajectory shard"]),
        (|shard| foreign_parquet::write(shard, "text", Some("1")), &["part-00000.parquet", "no column `sample_id`"]),
        (|shard| foreign_parquet::write(shard, "text", Some("99")), &["part-00000.parquet", "schema version 99"]),
        (
            |shard| fs::write(shard.with_file_name("../manifest.json"), "{\"schema_ver").unwrap(),
            &["manifest.json", "is not a manifest"],
        ),
    ];
    for (damage, parts) in damages {
        let dir = tempfile::tempdir().unwrap();
        let (data, output) = (dir.path().join("data"), path(dir.path(), "output"));
        copy_folder(good.path(), &data);
        damage(&data.join("data/part-00000.parquet"));
        for arguments in commands_that_read(&data.display().to_string(), &output) {
            DATA.fail(&arguments, 2, parts);
        }
        assert!(!Path::new(&output).exists(), "{parts:?}");
    }
}

#[test]
fn a_shard_with_another_number_of_rows_than_the_manifest_says_is_refused() {
    let (a, b) = (row("a", &[5, 6, 7, 0]), row("b", &[5, 6, 7, 0]));
    let (one, two) = (write_data_set(std::slice::from_ref(&a)), write_data_set(&[a, b]));
    fs::copy(one.path().join("data/part-00000.parquet"), two.path().join("data/part-00000.parquet")).unwrap();
    DATA.fail(&["stats", &path(two.path(), "")], 2, &["part-00000.parquet", "has 1 row,", "says 2"]);
}

#[test]
fn bad_settings_are_named_with_file_line_and_value() {
    let dir = tempfile::tempdir().unwrap();
    let file = path(dir.path(), "run.yaml");
    for (verb, misspelt, nearest) in
        [("collect", "modle: x", "`model`"), ("augment", "fractoin: 1", "`fraction`"), ("clean", "inptu: x", "`input`")]
    {
        fs::write(&file, format!("output: x\n{misspelt}\n")).unwrap();
        DATA.fail(&[verb, "-c", &file], 2, &["run.yaml", "line 2", "did you mean", nearest]);
        let key = misspelt.replace(": ", "=");
        DATA.fail(&[verb, &key], 2, &[&key, "did you mean", nearest]);
    }
    for (verb, out_of_range, said) in [
        ("collect", "n: 1", "n=1: lower than 2"),
        ("collect", "limit: 0", "limit=0: lower than 1"),
        ("augment", "fraction: 2", "fraction=2.0: greater than 1"),
        ("clean", "token_run: 1", "token_run=1: lower than 2"),
    ] {
        fs::write(&file, format!("output: x\n{out_of_range}\n")).unwrap();
        DATA.fail(&[verb, "-c", &file], 2, &["run.yaml, line 2: ", said]);
    }
    fs::write(&file, b"n: 8\nmodel: \xfc\n").unwrap();
    DATA.fail(&["collect", "-c", &file], 2, &["run.yaml: line 2 is not UTF-8"]);
    DATA.fail(&["collect", "-c", "no/such.yaml"], 2, &["no/such.yaml"]);
}

#[test]
fn required_settings_and_arguments_out_of_range_are_named() {
    let dir = tempfile::tempdir().unwrap();
    DATA.fail(&["collect"], 2, &["model is not set", "prompts is not set", "output is not set"]);
    DATA.fail(&["augment"], 2, &["input is not set", "output is not set"]);
    DATA.fail(&["clean"], 2, &["input is not set", "output is not set", "model is not set"]);
    let questions = path(dir.path(), "gsm8k");
    fs::create_dir(&questions).unwrap();
    let question = json!({ "question": "Tom has 3 apples and buys 4 more. How many?", "answer": "3+4=7\n#### 7" });
    fs::write(dir.path().join("gsm8k/train.jsonl"), question.to_string()).unwrap();
    let variants = ["prepare", "gsm8k", "--data", &questions, "--output", &path(dir.path(), "variants.jsonl")];
    let too_many = [&variants[..], &["--variants", "18446744073709551615"]].concat();
    DATA.fail(&too_many, 2, &["--variants 18446744073709551615 would make more than 10000000 prompts"]);
    for number in ["0", "1000000000000", "18446744073709551615"] {
        let prepare = ["prepare", "synthetic", "--num-problems", number, "--output", &path(dir.path(), "many.jsonl")];
        DATA.fail(&prepare, 2, &["--num-problems", "1..=10000000"]);
    }
}

#[test]
fn settings_that_do_not_fit_the_model_and_bad_prompt_sets_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let command = collect_command(&teacher(), &path(dir.path(), "output"));
    let with = |more: &str| [&command[..], &[more.to_owned()]].concat();
    DATA.fail(&with("eos_ids=[5, 999]"), 2, &["eos_ids: 999 is not in the vocabulary", "0 to 299"]);
    // A limit that no prompt can meet is not an empty data set.
    DATA.fail(&with("max_new_tokens=1000000"), 2, &["no prompt of", "fits the context of ", "lower max_new_tokens"]);
    for number in ["max_new_tokens", "rows_per_shard", "batch_size"] {
        DATA.fail(&with(&format!("{number}=18446744073709551615")), 2, &[number, "greater than "]);
    }
    let prompts = path(dir.path(), "prompts.jsonl");
    for (contents, said) in [
        (&b""[..], "prompts.jsonl: holds no prompts"),
        (b"\n{\"id\": \"\xfc\"}", "line 2 is not UTF-8"),
        (b"{\"id\": \"a\"", "line 1 is not JSON"),
    ] {
        fs::write(&prompts, contents).unwrap();
        DATA.fail(&with(&format!("prompts={prompts}")), 2, &[said]);
    }
}

/// Tokenizing takes some 200 bytes of memory for each byte of a text.
#[test]
fn a_prompt_of_thirty_megabytes_is_refused_before_it_is_tokenized() {
    let dir = tempfile::tempdir().unwrap();
    let prompts = path(dir.path(), "prompts.jsonl");
    fs::write(&prompts, json!({ "id": "long", "prompt": "word ".repeat(6_000_000) }).to_string()).unwrap();
    let command =
        [collect_command(&teacher(), &path(dir.path(), "output")), vec![format!("prompts={prompts}")]].concat();
    DATA.fail(&command, 2, &["row `long`", "the text has 30.0 MB, and texts of up to 4 MB are tokenized"]);
}

/// Titles, links and directions of a terminal are not set by a path or by data.
#[test]
fn control_characters_of_paths_and_ids_are_shown_not_obeyed() {
    let hostile = "a\x1b]0;title\x07\u{9b}31m\u{202e}b";
    let named = row(hostile, &[5, 6, 7, 0]);
    let data = write_data_set(std::slice::from_ref(&named));
    let inspected = String::from_utf8(DATA.succeed(&["inspect", &path(data.path(), "")]).stdout).unwrap();
    assert!(inspected.starts_with("a␛]0;title␇\u{fffd}31m\u{fffd}b ("), "{inspected}");
    let is_control = |character: char| character.is_control() && character != '\n' || character == '\u{202e}';
    assert!(!inspected.contains(is_control), "{inspected}");
    let missing = DATA.run(&["inspect", hostile]);
    assert!(missing.code == Some(2) && missing.stderr.contains("a␛]0;title"), "{}", missing.stderr);
    assert!(!missing.stderr.contains(is_control), "{}", missing.stderr);
    let unknown = DATA.run(&[hostile]);
    assert!(unknown.code == Some(2) && !unknown.stderr.contains(is_control), "{}", unknown.stderr);
}

#[test]
fn a_variable_for_another_program_is_ignored_with_a_note() {
    let data = write_data_set(&[row("a", &[5, 6, 7, 0])]);
    let output = path(data.path(), "output");
    let (input, into) = (format!("input={}", path(data.path(), "")), format!("output={output}"));
    let mut command = assert_cmd::Command::cargo_bin("cllm-data").unwrap();
    command.args(["augment", &input, &into]).env("CLLM_SET_OPTIMIZER__LR", "1").env("CLLM_SET_FRACTION", "0.25");
    let assert = command.assert().success();
    let said = String::from_utf8_lossy(&assert.get_output().stderr).into_owned();
    assert!(said.contains("environment variable CLLM_SET_OPTIMIZER__LR is ignored: unknown key"), "{said}");
    let settings = fs::read_to_string(Path::new(&output).join("config.yaml")).unwrap();
    assert!(settings.contains("fraction: 0.25"), "{settings}");
}

#[test]
fn a_missing_device_is_exit_code_3_and_an_unknown_one_2() {
    let dir = tempfile::tempdir().unwrap();
    let command = collect_command(&teacher(), &path(dir.path(), "output"));
    let with = |more: &str| [&command[..], &[more.to_owned()]].concat();
    DATA.fail(&with("device=cuda:4096"), 3, &["`cuda:4096`"]);
    DATA.fail(&with("device=gpu"), 2, &["`gpu` is unknown", "cuda:N"]);
    assert!(!dir.path().join("output").exists());
}

#[test]
fn a_path_that_cannot_be_written_is_exit_code_3_for_every_verb() {
    let dir = tempfile::tempdir().unwrap();
    let data = write_data_set(&[row("a", &[5, 6, 7, 0])]);
    let (data, output, model) = (path(data.path(), ""), unwritable_path(dir.path()), teacher());
    let said = ["/file", "cannot be written", "choose another path"];
    DATA.fail(&["prepare", "synthetic", "--num-problems", "2", "--output", &output], 3, &said);
    DATA.fail(&collect_command(&model, &output), 3, &said);
    for arguments in commands_that_read(&data, &output).split_off(3) {
        DATA.fail(&arguments, 3, &said);
    }
    let reference = path(dir.path(), "reference.json");
    DATA.succeed(&["export", &data, "--output", &reference]);
    DATA.fail(&["import", &reference, "--output", &output], 3, &said);
    // Naming a folder instead of a file is a mistake of the user, not of the machine.
    let folder = dir.path().display().to_string();
    DATA.fail(&["prepare", "synthetic", "--num-problems", "2", "--output", &folder], 2, &["name a file"]);
}

#[test]
fn on_a_full_disk_collect_keeps_its_shards_and_can_be_resumed() {
    let dir = tempfile::tempdir().unwrap();
    let (whole, output) = (path(dir.path(), "whole"), path(dir.path(), "output"));
    // The last shard is the largest, so that a limit lets the first two through but not the third.
    let prompts = path(dir.path(), "long-last.jsonl");
    let prompt =
        |index: usize| if index < 16 { index.to_string() } else { fingerprint::hash_bytes(&[index as u8]).repeat(9) };
    let row =
        |index| json!({ "id": format!("s{index}"), "source": "jsonl/train", "prompt": prompt(index) }).to_string();
    fs::write(&prompts, (0..24).map(row).collect::<Vec<_>>().join("\n")).unwrap();
    let prompts = format!("prompts={prompts}");
    collect(&whole, &[&prompts]);
    let command = [&collect_command(&teacher(), &output)[..], &[prompts]].concat();
    let blocks: Vec<usize> = shards(&whole).iter().map(|shard| shard.len().div_ceil(512)).collect();
    assert!(blocks[0] < blocks[2] && blocks[1] < blocks[2], "{blocks:?}");
    DATA.fail_on_full_disk(blocks[2] - 1, &command, &["part-00002.parquet", "finished shards are kept"]);
    assert_eq!(shards(&whole)[..2], [0, 1].map(|index| fs::read(shard(&output, index)).unwrap()));
    let mut left = fs::read_dir(Path::new(&output).join("data")).unwrap().map(|entry| entry.unwrap().file_name());
    assert!(left.all(|name| !name.to_string_lossy().starts_with('.')), "no half-written file is left");
    DATA.succeed(&command);
    assert_eq!(shards(&whole), shards(&output));
}

#[test]
fn after_a_full_disk_the_same_augment_or_clean_makes_the_same_data_set() {
    let dir = tempfile::tempdir().unwrap();
    let answer = |start: i32| (start..start + 40).chain([0]).collect::<Vec<_>>();
    let data = write_data_set(&[row("a", &answer(20)), row("b", &answer(70)), row("c", &answer(120))]);
    let read = |name: &str, file: &str| fs::read(dir.path().join(name).join(file)).unwrap();
    let (input, model) = (format!("input={}", data.path().display()), format!("model={}", teacher()));
    for verb in [&["augment", &input][..], &["clean", &input, &model]] {
        let verb: Vec<String> = verb.iter().map(|&word| word.to_owned()).collect();
        let (once, again) = (format!("{}-once", verb[0]), format!("{}-again", verb[0]));
        let into = |name: &str| [&verb[..], &[format!("output={}", path(dir.path(), name))]].concat();
        DATA.succeed(&into(&once));
        let again_into = into(&again);
        DATA.fail_on_full_disk(2, &again_into, &["part-00000.parquet"]);
        DATA.succeed(&again_into);
        for file in ["data/part-00000.parquet", "manifest.json", "README.md"] {
            assert_eq!(read(&once, file), read(&again, file), "{} {file}", verb[0]);
        }
        // Once more, there is nothing left to do; with another setting, it is another data set.
        let before = files_of(&dir.path().join(&again));
        let said = DATA.succeed(&[&again_into[..], &["--json".to_owned()]].concat());
        assert!(said.stderr.contains("already complete: "), "{}", said.stderr);
        let first = DATA.succeed(&[&into(&once)[..], &["--json".to_owned()]].concat());
        assert_eq!(first.stdout, said.stdout);
        assert_eq!(files_of(&dir.path().join(&again)), before);
        let (other, clause) = match verb[0].as_str() {
            "augment" => ("fraction=0.25", "was started with fraction=0.5; this command says 0.25"),
            _ => ("token_run=3", "was started with token_run=10; this command says 3"),
        };
        DATA.fail(&[&again_into[..], &[other.to_owned()]].concat(), 2, &["was started with ", clause]);
    }
}

/// The names and contents of the files in a folder.
fn files_of(folder: &Path) -> Vec<(std::ffi::OsString, Vec<u8>)> {
    let entries = fs::read_dir(folder).unwrap().map(Result::unwrap).filter(|entry| entry.path().is_file());
    let mut files: Vec<_> = entries.map(|entry| (entry.file_name(), fs::read(entry.path()).unwrap())).collect();
    files.sort();
    files
}

#[test]
fn a_folder_with_files_of_the_user_is_never_written_to() {
    let dir = tempfile::tempdir().unwrap();
    let [data, project] = ["data", "project"].map(|name| path(dir.path(), name));
    collect(&data, &[]);
    fs::create_dir(&project).unwrap();
    for name in ["README.md", "config.yaml"] {
        fs::write(Path::new(&project).join(name), "mine").unwrap();
    }
    let (input, output, model) = (format!("input={data}"), format!("output={project}"), format!("model={}", teacher()));
    let before = files_of(Path::new(&project));
    for command in [
        collect_command(&teacher(), &project),
        vec!["augment".to_owned(), input.clone(), output.clone()],
        vec!["clean".to_owned(), input, output, model],
    ] {
        DATA.fail(&command, 2, &[&project, "holds files that this command did not write (README.md, config.yaml)"]);
    }
    assert_eq!(files_of(Path::new(&project)), before);
}

#[test]
fn clean_that_drops_everything_is_negative_and_says_what_to_change() {
    let dir = tempfile::tempdir().unwrap();
    let input = write_data_set(&[row("a", &[5, 6, 7]), row("b", &[5, 6, 8])]);
    let output = path(dir.path(), "clean");
    let command = [
        "clean".to_owned(),
        format!("input={}", input.path().display()),
        format!("output={output}"),
        format!("model={}", teacher()),
    ];
    for _ in 0..2 {
        let run = DATA.run(&command);
        assert_eq!(run.code, Some(1), "{}", run.stderr);
        assert!(run.stderr.contains("dropped: 2 unfinished (raise max_new_tokens"), "{}", run.stderr);
    }
}

#[test]
fn on_a_full_disk_no_prompt_set_and_no_exported_file_is_left() {
    let dir = tempfile::tempdir().unwrap();
    let [data, prompts, exported] = ["data", "prompts.jsonl", "exported.json"].map(|name| path(dir.path(), name));
    collect(&data, &[]);
    let prepare = ["prepare", "synthetic", "--num-problems", "100", "--output", &prompts];
    DATA.fail_on_full_disk(2, &prepare, &["prompts.jsonl"]);
    DATA.fail_on_full_disk(2, &["export", &data, "--output", &exported], &["exported.json"]);
    assert!(!Path::new(&prompts).exists() && !Path::new(&exported).exists());
}

#[test]
fn a_stdout_that_cannot_be_written_is_an_error() {
    let data = write_data_set(&[row("a", &[5, 6, 7, 0])]);
    let data = path(data.path(), "");
    for arguments in [&["stats", &data][..], &["stats", &data, "--json"], &["validate", &data], &["inspect", &data]] {
        DATA.fail_on_full_stdout(arguments);
    }
    DATA.fail_on_full_stdout(&["completions", "bash"]);
}

#[test]
fn a_cut_shard_and_foreign_parquet_are_refused() {
    let dir = write_data_set(&[row("a", &[5, 6, 7, 0])]);
    let shard = dir.path().join("data/part-00000.parquet");
    let bytes = fs::read(&shard).unwrap();
    fs::write(&shard, &bytes[..bytes.len() / 2]).unwrap();
    for verb in ["stats", "validate", "inspect"] {
        let said = run_error(&[verb, &dir.path().display().to_string()], 2);
        assert!(said.contains("part-00000.parquet"), "{said}");
    }
    fs::write(&shard, b"PAR1 no").unwrap();
    assert!(run_error(&["stats", &shard.display().to_string()], 2).contains("Parquet"));
    assert!(run_error(&["stats", "nowhere"], 2).contains("nowhere"));
}
