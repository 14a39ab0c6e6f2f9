//! What every verb says of bad input, of places that cannot be written, and of devices that are not there.

use cllm_core::checkpoint;
use std::fs;
use std::path::Path;

use cllm_core::fingerprint;
use serde_json::json;

use crate::{WORLD, collect, made, row, shard, shards};
use cllm_testing::foreign_parquet;
use cllm_testing::programs::{Program, copy_folder, damaged_models, path, unwritable_path};

const DATA: Program = Program("cllm-data");

/// The arguments of `collect` into `output`, with a model of its own.
fn collecting(model: &str, output: &str) -> Vec<String> {
    let prompts = format!("prompts={}", path(WORLD.path(), "prompts.jsonl"));
    let given = [format!("model={model}"), prompts, format!("output={output}")];
    let fixed = ["collect", "n=8", "max_new_tokens=20", "device=cpu", "rows_per_shard=8"].map(str::to_owned);
    [&fixed[..], &given].concat()
}

/// Every verb that reads a data set, and writes under `output` if at all.
fn readers(data: &str, output: &str) -> Vec<Vec<String>> {
    let model = path(WORLD.path(), "model");
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
    let data = made(&[row("a", &[5, 6, 7, 0])]);
    let (data, output) = (path(data.path(), ""), path(dir.path(), "output"));
    fs::write(dir.path().join("reference.json"), "[]").unwrap();
    for (model, parts) in damaged_models(&WORLD.path().join("model"), dir.path()) {
        DATA.fail(&collecting(&model, &output), 2, &parts);
        // These read the tokenizer alone, and no weights.
        if model.ends_with("tokenizer") {
            let (input, into, model_is) =
                (format!("input={data}"), format!("output={output}"), format!("model={model}"));
            DATA.fail(&["clean", &input, &into, &model_is], 2, &parts);
            DATA.fail(&["inspect", &data, "--model", &model], 2, &parts);
        }
        assert!(!Path::new(&output).exists(), "{model}");
    }
    DATA.fail(&collecting("no/such/model", &output), 2, &["no/such/model", "no such"]);
}

#[test]
fn a_benchmark_is_prepared_by_the_split_it_has_and_one_without_prompts_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (data, output) = (path(dir.path(), ""), path(dir.path(), "prompts.jsonl"));
    let mbpp = json!({"task_id": 11, "prompt": "Add.", "code": "def add(): pass", "test_imports": [], "test_list": ["assert add"]});
    fs::write(dir.path().join("mbpp.jsonl"), mbpp.to_string()).unwrap();
    let words = ["prepare", "mbpp", "--data", &data, "--output", &output];
    DATA.fail(&words, 2, &["no prompts of the split `train` of mbpp"]);
    assert!(!Path::new(&output).exists());
    let problem = json!({"task_id": "HumanEval/0", "prompt": "def f():\n", "canonical_solution": "    pass\n",
        "test": "def check(f):\n    pass\n", "entry_point": "f"});
    fs::write(dir.path().join("HumanEval.jsonl"), problem.to_string()).unwrap();
    DATA.succeed(&["prepare", "humaneval", "--data", &data, "--output", &output]);
    assert_eq!(fs::read_to_string(&output).unwrap().lines().count(), 1);
}

#[test]
fn another_tokenizer_reads_no_data_set() {
    let dir = tempfile::tempdir().unwrap();
    let data = made(&[row("a", &[5, 6, 7, 0])]);
    let (data, output) = (path(data.path(), ""), path(dir.path(), "output"));
    let model = dir.path().join("model");
    copy_folder(&WORLD.path().join("model"), &model);
    cllm_testing::train_tokenizer(["Other words make other ids."], 290, &model);
    let model = model.display().to_string();
    let said = ["was collected with tokenizer", "give the model"];
    DATA.fail(&["inspect", &data, "--model", &model], 2, &said);
    let (input, into, model) = (format!("input={data}"), format!("output={output}"), format!("model={model}"));
    DATA.fail(&["clean", &input, &into, &model], 2, &said);
    assert!(!Path::new(&output).exists());
}

#[test]
fn validate_compares_with_the_model_given() {
    let dir = tempfile::tempdir().unwrap();
    let (data, model) = (path(dir.path(), "data"), path(WORLD.path(), "model"));
    collect(&data, &["limit=4"]);
    DATA.succeed(&["validate", &data, "--model", &model]);
    // A model of another tokenizer and fewer ids: every fingerprint differs, and ids are out of its range.
    let other = dir.path().join("other");
    fs::create_dir(&other).unwrap();
    let config = json!({
        "model_type": "llama", "vocab_size": 262, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
        "num_attention_heads": 2, "tie_word_embeddings": true,
    });
    let config = cllm_core::model::ModelConfig::from_json(&config).unwrap();
    let random = cllm_core::model::Transformer::random(config, 1, tch::Device::Cpu, tch::Kind::Float);
    checkpoint::save(&random, &other, tch::Kind::Float).unwrap();
    cllm_testing::train_tokenizer(["Other"], 262, &other);
    let found = DATA.run(&["validate", &data, "--model", &path(dir.path(), "other")]);
    let text = String::from_utf8(found.stdout).unwrap();
    assert_eq!(found.code, Some(1), "{text}{}", found.stderr);
    for part in
        ["teacher: ", "tokenizer: ", "vocabulary: 300 in the data set, 262 in ", "outside the vocabulary of 262"]
    {
        assert!(text.contains(part), "`{part}` is not in: {text}");
    }
    DATA.fail(&["validate", &data, "--model", "no/such/model"], 2, &["no/such/model"]);
}

#[test]
fn every_bad_shard_is_named_by_every_verb_and_nothing_is_written() {
    let good = made(&[row("a", &[5, 6, 7, 0]), row("b", &[5, 6, 7, 0])]);
    type Damage = fn(&Path);
    let damages: [(Damage, &[&str]); 6] = [
        (
            |shard| {
                let bytes = fs::read(shard).unwrap();
                fs::write(shard, &bytes[..bytes.len() / 2]).unwrap();
            },
            &["part-00000.parquet", "no whole Parquet file", "collect again"],
        ),
        (|shard| fs::remove_file(shard).unwrap(), &["part-00000.parquet", "there is no such file"]),
        (|shard| foreign_parquet::write(shard, "text", None), &["part-00000.parquet", "no trajectory shard"]),
        (|shard| foreign_parquet::write(shard, "text", Some("1")), &["part-00000.parquet", "no column `sample_id`"]),
        (|shard| foreign_parquet::write(shard, "text", Some("99")), &["part-00000.parquet", "schema version 99"]),
        (
            |shard| fs::write(shard.with_file_name("manifest.json"), "{\"schema_ver").unwrap(),
            &["manifest.json", "is no manifest"],
        ),
    ];
    for (damage, parts) in damages {
        let dir = tempfile::tempdir().unwrap();
        let (data, output) = (dir.path().join("data"), path(dir.path(), "output"));
        copy_folder(good.path(), &data);
        damage(&data.join("part-00000.parquet"));
        for arguments in readers(&data.display().to_string(), &output) {
            DATA.fail(&arguments, 2, parts);
        }
        assert!(!Path::new(&output).exists(), "{parts:?}");
    }
}

#[test]
fn a_shard_of_another_size_than_the_manifest_says_is_refused() {
    let (one, two) = (made(&[row("a", &[5, 6, 7, 0])]), made(&[row("a", &[5, 6, 7, 0]), row("b", &[5, 6, 7, 0])]));
    fs::copy(one.path().join("part-00000.parquet"), two.path().join("part-00000.parquet")).unwrap();
    DATA.fail(&["stats", &path(two.path(), "")], 2, &["part-00000.parquet", "has 1 rows", "says 2"]);
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
    for (verb, wrong, said) in [
        ("collect", "n: 1", "n=1: lower than 2"),
        ("augment", "fraction: 2", "fraction=2.0: greater than 1"),
        ("clean", "token_run: 1", "token_run=1: lower than 2"),
    ] {
        fs::write(&file, format!("output: x\n{wrong}\n")).unwrap();
        DATA.fail(&[verb, "-c", &file], 2, &["run.yaml, line 2: ", said]);
    }
    for count in ["0", "1000000000000", "18446744073709551615"] {
        let prepare = ["prepare", "synthetic", "--count", count, "--output", &path(dir.path(), "many.jsonl")];
        DATA.fail(&prepare, 2, &["--count", "1..=10000000"]);
    }
    DATA.fail(&["collect"], 2, &["model is not set", "prompts is not set", "output is not set"]);
    DATA.fail(&["augment"], 2, &["input is not set", "output is not set"]);
    DATA.fail(&["clean"], 2, &["input is not set", "output is not set", "model is not set"]);
    DATA.fail(&["collect", "-c", "no/such.yaml"], 2, &["no/such.yaml"]);
    let model = path(WORLD.path(), "model");
    let arguments = collecting(&model, &path(dir.path(), "output"));
    let with = |more: &str| [&arguments[..], &[more.to_owned()]].concat();
    DATA.fail(&with("eos_ids=[5, 999]"), 2, &["eos_ids: 999", "300"]);
    // Nothing overflows, and a limit that no prompt meets is no empty data set.
    DATA.fail(&with("max_new_tokens=18446744073709551615"), 2, &["no prompt of", "lower max_new_tokens"]);
    let empty = path(dir.path(), "empty.jsonl");
    fs::write(&empty, "").unwrap();
    DATA.fail(&with(&format!("prompts={empty}")), 2, &["empty.jsonl", "holds no prompts"]);
    fs::write(&empty, b"\n{\"id\": \"\xfc\"}").unwrap();
    DATA.fail(&with(&format!("prompts={empty}")), 2, &["empty.jsonl: line 2 is not UTF-8"]);
    fs::write(&file, b"n: 8\nmodel: \xfc\n").unwrap();
    DATA.fail(&["collect", "-c", &file], 2, &["run.yaml: line 2 is not UTF-8"]);
    fs::write(&empty, "{\"id\": \"a\"").unwrap();
    DATA.fail(&with(&format!("prompts={empty}")), 2, &["empty.jsonl: line 1"]);
}

#[test]
fn a_variable_for_another_program_is_passed_over_with_a_note() {
    let data = made(&[row("a", &[5, 6, 7, 0])]);
    let output = path(data.path(), "output");
    let (input, into) = (format!("input={}", path(data.path(), "")), format!("output={output}"));
    let mut command = assert_cmd::Command::cargo_bin("cllm-data").unwrap();
    command.args(["augment", &input, &into]).env("CLLM_SET_OPTIMIZER__LR", "1").env("CLLM_SET_FRACTION", "0.25");
    let ended = command.assert().success();
    let said = String::from_utf8_lossy(&ended.get_output().stderr).into_owned();
    assert!(said.contains("environment variable CLLM_SET_OPTIMIZER__LR is ignored: unknown key"), "{said}");
    let settings = fs::read_to_string(Path::new(&output).join("settings.yaml")).unwrap();
    assert!(settings.contains("fraction: 0.25"), "{settings}");
}

#[test]
fn a_device_that_is_not_there_is_3_and_one_that_is_none_is_2() {
    let dir = tempfile::tempdir().unwrap();
    let arguments = collecting(&path(WORLD.path(), "model"), &path(dir.path(), "output"));
    let with = |more: &str| [&arguments[..], &[more.to_owned()]].concat();
    DATA.fail(&with("device=cuda:4096"), 3, &["`cuda:4096`"]);
    DATA.fail(&with("device=gpu"), 2, &["`gpu` is unknown", "cuda:N"]);
    assert!(!dir.path().join("output").exists());
}

#[test]
fn a_place_that_cannot_be_written_is_3_for_every_verb() {
    let dir = tempfile::tempdir().unwrap();
    let data = made(&[row("a", &[5, 6, 7, 0])]);
    let (data, output, model) = (path(data.path(), ""), unwritable_path(dir.path()), path(WORLD.path(), "model"));
    let said = ["/file", "cannot be written", "choose another path"];
    DATA.fail(&["prepare", "synthetic", "--count", "2", "--output", &output], 3, &said);
    DATA.fail(&collecting(&model, &output), 3, &said);
    for arguments in readers(&data, &output).split_off(3) {
        DATA.fail(&arguments, 3, &said);
    }
    let reference = path(dir.path(), "reference.json");
    DATA.succeed(&["export", &data, "--output", &reference]);
    DATA.fail(&["import", &reference, "--model", &model, "--output", &output], 3, &said);
    // A folder in place of a file is a slip of the hand, not of the machine.
    let folder = dir.path().display().to_string();
    DATA.fail(&["prepare", "synthetic", "--count", "2", "--output", &folder], 2, &["name a file"]);
}

#[test]
fn on_a_full_disk_what_is_finished_stays_and_the_same_command_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let (whole, output) = (path(dir.path(), "whole"), path(dir.path(), "output"));
    // The last shard is the largest, so that a limit lets the first two through and not the third.
    let prompts = path(dir.path(), "long-last.jsonl");
    let prompt =
        |index: usize| if index < 16 { index.to_string() } else { fingerprint::hash_bytes(&[index as u8]).repeat(9) };
    let row =
        |index| json!({ "id": format!("s{index}"), "source": "jsonl/train", "prompt": prompt(index) }).to_string();
    fs::write(&prompts, (0..24).map(row).collect::<Vec<_>>().join("\n")).unwrap();
    let prompts = format!("prompts={prompts}");
    collect(&whole, &[&prompts]);
    let model = path(WORLD.path(), "model");
    let arguments = [&collecting(&model, &output)[..], &[prompts]].concat();
    let blocks: Vec<usize> = shards(&whole).iter().map(|shard| shard.len().div_ceil(512)).collect();
    assert!(blocks[0] < blocks[2] && blocks[1] < blocks[2], "{blocks:?}");
    DATA.fail_on_full_disk(blocks[2] - 1, &arguments, &["part-00002.parquet"]);
    assert_eq!(shards(&whole)[..2], [0, 1].map(|index| fs::read(shard(&output, index)).unwrap()));
    let left = fs::read_dir(&output).unwrap().map(|entry| entry.unwrap().file_name());
    assert!(left.into_iter().all(|name| !name.to_string_lossy().starts_with('.')), "nothing half-written stays");
    DATA.succeed(&arguments);
    assert_eq!(shards(&whole), shards(&output));
    let read = |name: &str, file: &str| fs::read(dir.path().join(name).join(file)).unwrap();
    let (input, model) = (format!("input={whole}"), format!("model={model}"));
    for verb in [&["augment", &input][..], &["clean", &input, &model, "drop_unfinished=false"]] {
        let verb: Vec<String> = verb.iter().map(|&word| word.to_owned()).collect();
        let (once, again) = (format!("{}-once", verb[0]), format!("{}-again", verb[0]));
        let into = |name: &str| [&verb[..], &[format!("output={}", path(dir.path(), name))]].concat();
        DATA.succeed(&into(&once));
        let again_into = into(&again);
        DATA.fail_on_full_disk(2, &again_into, &["part-00000.parquet"]);
        DATA.succeed(&again_into);
        for file in ["part-00000.parquet", "manifest.json", "README.md"] {
            assert_eq!(read(&once, file), read(&again, file), "{} {file}", verb[0]);
        }
        DATA.fail(&again_into, 2, &["holds a data set already"]);
    }
    let prompts = path(dir.path(), "prompts.jsonl");
    DATA.fail_on_full_disk(2, &["prepare", "synthetic", "--count", "100", "--output", &prompts], &["prompts.jsonl"]);
    let exported = path(dir.path(), "exported.json");
    DATA.fail_on_full_disk(2, &["export", &whole, "--output", &exported], &["exported.json"]);
    assert!(!Path::new(&prompts).exists() && !Path::new(&exported).exists());
}

#[test]
fn a_full_stdout_is_said() {
    let data = made(&[row("a", &[5, 6, 7, 0])]);
    let data = path(data.path(), "");
    for arguments in [&["stats", &data][..], &["stats", &data, "--json"], &["validate", &data], &["inspect", &data]] {
        DATA.fail_on_full_stdout(arguments);
    }
    DATA.fail_on_full_stdout(&["completions", "bash"]);
}
