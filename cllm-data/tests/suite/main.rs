//! `cllm-data` from the outside: the verbs on a tiny random teacher.
#![allow(clippy::unwrap_used)]

mod bad_input;
mod checks;
mod interrupted;
mod rewrite;
mod scoring;

use cllm_core::checkpoint;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use assert_cmd::Command;
use cllm_core::model::{ModelConfig, Transformer};
use cllm_core::tokenizer::Tokenizer;
use cllm_core::trajectory::{Block, FinishReason, Provenance, Reader, Trajectory, Writer};
use serde_json::{Value, json};

/// A folder with a teacher of random weights and 24 prompts, made once.
static WORLD: LazyLock<tempfile::TempDir> = LazyLock::new(|| {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model");
    fs::create_dir(&model).unwrap();
    let config = json!({
        "model_type": "llama", "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 400, "tie_word_embeddings": true,
    });
    let config = ModelConfig::from_json(&config).unwrap();
    let transformer = Transformer::random(config, 3, tch::Device::Cpu, tch::Kind::Float);
    checkpoint::save(&transformer, &model, tch::Kind::Float).unwrap();
    cllm_testing::train_tokenizer(["Tom has 3 apples and buys 4 more."], 300, &model);
    run(&["prepare", "synthetic", "--count", "24", "--output", &path(dir.path(), "prompts.jsonl")]).success();
    dir
});

fn run(arguments: &[&str]) -> assert_cmd::assert::Assert {
    Command::cargo_bin("cllm-data").unwrap().arg("--quiet").args(arguments).assert()
}

fn json_of(arguments: &[&str]) -> Value {
    serde_json::from_slice(&run(arguments).success().get_output().stdout).unwrap()
}

fn message(arguments: &[&str], code: i32) -> String {
    String::from_utf8(run(arguments).code(code).get_output().stderr.clone()).unwrap()
}

fn path(folder: &Path, name: &str) -> String {
    folder.join(name).display().to_string()
}

fn collect(output: &str, more: &[&str]) -> Value {
    let world = WORLD.path();
    let settings = [
        format!("model={}", path(world, "model")),
        format!("prompts={}", path(world, "prompts.jsonl")),
        format!("output={output}"),
    ];
    let mut arguments = vec!["collect", "--json"];
    arguments.extend(settings.iter().map(String::as_str));
    arguments.extend(["n=8", "max_new_tokens=20", "device=cpu", "rows_per_shard=8"]);
    arguments.extend(more);
    json_of(&arguments)
}

fn shard(folder: &str, index: usize) -> PathBuf {
    Path::new(folder).join(format!("part-{index:05}.parquet"))
}

fn shards(folder: &str) -> Vec<Vec<u8>> {
    (0..3).map(|index| fs::read(shard(folder, index)).unwrap()).collect()
}

fn rows(folder: &str) -> Vec<Trajectory> {
    Reader::open(Path::new(folder)).unwrap().rows().map(Result::unwrap).collect()
}

#[test]
fn several_processes_collect_a_share_each_and_together_a_data_set() {
    let dir = tempfile::tempdir().unwrap();
    let (alone, shared) = (path(dir.path(), "alone"), path(dir.path(), "shared"));
    collect(&alone, &[]);
    let (model, prompts) = (path(WORLD.path(), "model"), path(WORLD.path(), "prompts.jsonl"));
    let (model, prompts, output) = (format!("model={model}"), format!("prompts={prompts}"), format!("output={shared}"));
    let settings = [&model, &prompts, &output, "n=8", "max_new_tokens=20", "device=cpu", "rows_per_shard=8"];
    let of = |rank: &str| {
        let mut command = Command::cargo_bin("cllm-data").unwrap();
        command.args(["--quiet", "collect"]).args(settings).env("WORLD_SIZE", "2").env("RANK", rank);
        command.env("MASTER_ADDR", "nobody").env("MASTER_PORT", "1").assert().success();
    };
    of("1");
    let error = message(&["stats", &shared], 2);
    assert!(error.contains("rank-0-of-2: is missing"), "{error}");
    of("0");
    let sorted = |folder: &str| {
        let mut rows = rows(folder);
        rows.sort_by(|a, b| a.sample_id.cmp(&b.sample_id));
        rows
    };
    assert_eq!(sorted(&shared), sorted(&alone));
    assert_eq!(json_of(&["validate", "--json", &shared])["rows"], 24);
}

#[test]
fn the_same_seed_gives_the_same_files_whatever_the_batching_and_the_interruption() {
    let dir = tempfile::tempdir().unwrap();
    let (once, again, other) = (path(dir.path(), "a"), path(dir.path(), "b"), path(dir.path(), "c"));
    let summary = collect(&once, &["batch_size=64"]);
    assert_eq!(
        (&summary["wanted"], &summary["resumed"], &summary["total"]["rows"]),
        (&json!(24), &json!(0), &json!(24))
    );
    collect(&again, &["batch_size=5"]);
    assert_eq!(shards(&once), shards(&again));
    let manifest = fs::read(Path::new(&again).join("manifest.json")).unwrap();
    // A run killed after its first shard: the second was cut, the third never came.
    let second = Path::new(&again).join("part-00001.parquet");
    fs::write(&second, &fs::read(&second).unwrap()[..300]).unwrap();
    fs::remove_file(Path::new(&again).join("part-00002.parquet")).unwrap();
    let resumed = collect(&again, &[]);
    // The forwards of earlier rows are told by their states: the total is that of a run that was not stopped.
    assert_eq!((&resumed["resumed"], &resumed["total"]), (&json!(8), &summary["total"]));
    assert_eq!((&resumed["run"]["rows"], &summary["run"]["rows"]), (&json!(16), &json!(24)));
    assert_eq!(shards(&once), shards(&again));
    assert_eq!(manifest, fs::read(Path::new(&again).join("manifest.json")).unwrap());
    collect(&other, &["seed=1"]);
    assert_ne!(shards(&once), shards(&other));
    let prompts = cllm_core::prompt_set::read(&WORLD.path().join("prompts.jsonl")).unwrap();
    let ids = |rows: Vec<Trajectory>| rows.into_iter().map(|row| row.sample_id).collect::<Vec<_>>();
    assert_eq!(ids(rows(&once)), prompts.into_iter().map(|sample| sample.id).collect::<Vec<_>>());
    run(&["validate", &once]).success();
    let whole = json_of(&["stats", &once, "--json"]);
    for figure in ["rows", "unfinished", "response_tokens", "blocks", "tokens_per_forward"] {
        assert_eq!(whole[figure], summary["total"][figure], "{figure}");
    }
    assert!(fs::read_to_string(Path::new(&once).join("README.md")).unwrap().starts_with("---\n"));
}

#[test]
fn the_same_seed_gives_the_same_file_for_every_family() {
    for (name, mut config) in cllm_testing::families::shapes() {
        let dir = tempfile::tempdir().unwrap();
        let model = dir.path().join("model");
        fs::create_dir(&model).unwrap();
        config["vocab_size"] = 300.into();
        config["max_position_embeddings"] = 400.into();
        checkpoint::save(&cllm_testing::families::random_model(&config, 5), &model, tch::Kind::Float).unwrap();
        for file in ["tokenizer.json", "tokenizer_config.json", "generation_config.json"] {
            fs::copy(WORLD.path().join("model").join(file), model.join(file)).unwrap();
        }
        let model = format!("model={}", model.display());
        let file = |folder: &str, more: &str| {
            let folder = path(dir.path(), folder);
            collect(&folder, &[model.as_str(), "limit=6", more]);
            fs::read(shard(&folder, 0)).unwrap()
        };
        let once = file("a", "batch_size=64");
        assert!(once == file("b", "batch_size=64"), "{name}");
        assert!(once == file("c", "batch_size=5"), "{name}: batched otherwise");
        assert!(once != file("d", "seed=1"), "{name}: another seed");
    }
}

#[test]
fn prompt_sets_are_parquet_where_their_names_say_so() {
    let dir = tempfile::tempdir().unwrap();
    let (prompts, back) = (path(dir.path(), "prompts.parquet"), path(dir.path(), "back.jsonl"));
    run(&["prepare", "synthetic", "--count", "24", "--output", &prompts]).success();
    assert!(fs::read(&prompts).unwrap().starts_with(b"PAR1"));
    run(&["prepare", "jsonl", "--data", &prompts, "--output", &back]).success();
    assert_eq!(fs::read(&back).unwrap(), fs::read(path(WORLD.path(), "prompts.jsonl")).unwrap());
    let data = path(dir.path(), "a");
    assert_eq!(collect(&data, &[&format!("prompts={prompts}"), "limit=4"])["total"]["rows"], 4);
}

#[test]
fn variants_stand_behind_the_prompts_without_answers() {
    let dir = tempfile::tempdir().unwrap();
    let rows = r#"{"question": "Tom has 3 pens and buys 25. How many?", "answer": "28\n#### 28"}"#;
    fs::write(dir.path().join("train.jsonl"), rows).unwrap();
    let (data, output) = (path(dir.path(), ""), path(dir.path(), "prompts.jsonl"));
    run(&["prepare", "gsm8k", "--data", &data, "--variants", "2", "-o", &output]).success();
    let text = fs::read_to_string(&output).unwrap();
    let found: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let ids: Vec<&str> = found.iter().map(|row| row["id"].as_str().unwrap()).collect();
    assert_eq!(ids, ["gsm8k-train-0", "gsm8k-train-0-variant-0", "gsm8k-train-0-variant-1"]);
    assert!(found[0]["reference"].is_string() && found[1..].iter().all(|row| row["reference"].is_null()), "{text}");
    let refused = message(&["prepare", "synthetic", "--count", "2", "--variants", "1", "-o", &output], 2);
    assert!(refused.contains("only gsm8k and spider"), "{refused}");
}

#[test]
fn the_name_of_the_prompt_file_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (renamed, output) = (path(dir.path(), "renamed.jsonl"), path(dir.path(), "a"));
    fs::copy(WORLD.path().join("prompts.jsonl"), &renamed).unwrap();
    collect(&output, &["limit=4"]);
    let before = fs::read(shard(&output, 0)).unwrap();
    collect(&output, &["limit=4", &format!("prompts={renamed}")]);
    assert_eq!(fs::read(shard(&output, 0)).unwrap(), before);
    let other = path(dir.path(), "b");
    collect(&other, &["limit=4", &format!("prompts={renamed}")]);
    assert_eq!(fs::read(shard(&other, 0)).unwrap(), before);
}

#[test]
fn plain_jsonl_is_a_prompt_set_as_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let (plain, output) = (path(dir.path(), "plain.jsonl"), path(dir.path(), "prompts.jsonl"));
    let row = |id: &str| format!("{{{id}\"prompt\": \"2+2=\", \"reference\": \"4\", \"level\": 3}}\n");
    fs::write(&plain, row("\"id\": \"a\", ")).unwrap();
    let prompts = format!("prompts={plain}");
    collect(&path(dir.path(), "data"), &[&prompts]);
    let found = &rows(&path(dir.path(), "data"))[0];
    assert_eq!((found.source.as_str(), found.meta.as_deref()), ("jsonl", Some("{\"level\":3}")));
    fs::write(&plain, row("") + &row("")).unwrap();
    let [model, output_is] = [("model", path(WORLD.path(), "model")), ("output", path(dir.path(), "other"))]
        .map(|(key, value)| format!("{key}={value}"));
    assert!(message(&["collect", &model, &prompts, &output_is], 2).contains("`cllm-data prepare jsonl`"));
    run(&["prepare", "jsonl", "--data", &plain, "--output", &output]).success();
    let text = fs::read_to_string(&output).unwrap();
    assert!(text.contains("jsonl-1") && text.contains("jsonl-2"), "{text}");
}

#[test]
fn resuming_with_other_settings_names_the_field() {
    let dir = tempfile::tempdir().unwrap();
    let output = path(dir.path(), "a");
    collect(&output, &["limit=2"]);
    let model = format!("model={}", path(WORLD.path(), "model"));
    let prompts = format!("prompts={}", path(WORLD.path(), "prompts.jsonl"));
    let output = format!("output={output}");
    let said = message(&["collect", &model, &prompts, &output, "n=4", "device=cpu", "limit=2"], 2);
    assert!(said.contains("n is 8 there and 4 here"), "{said}");
    let said = message(&["collect", &model, &prompts, &output, "batch_row=4"], 2);
    assert!(said.contains("did you mean `batch_size`"), "{said}");
}

#[test]
fn prompts_too_long_for_the_context_are_set_aside() {
    let dir = tempfile::tempdir().unwrap();
    let (prompts, output) = (path(dir.path(), "p.jsonl"), path(dir.path(), "a"));
    let row = |id: &str, text: String| json!({ "id": id, "source": "jsonl/train", "prompt": text }).to_string() + "\n";
    fs::write(&prompts, row("long", "apples ".repeat(400)) + &row("short", "3+4".to_owned())).unwrap();
    let summary = collect(&output, &[&format!("prompts={prompts}")]);
    assert_eq!((&summary["wanted"], &summary["total"]["rows"], &summary["skipped"]), (&json!(2), &json!(1), &json!(1)));
    assert!(fs::read_to_string(Path::new(&output).join("skipped.jsonl")).unwrap().contains("\"long\""));
}

#[test]
fn a_cut_shard_and_other_parquet_are_refused() {
    let dir = made(&[row("a", &[5, 6, 7, 0])]);
    let shard = dir.path().join("part-00000.parquet");
    let bytes = fs::read(&shard).unwrap();
    fs::write(&shard, &bytes[..bytes.len() / 2]).unwrap();
    for verb in ["stats", "validate", "inspect"] {
        let said = message(&[verb, &dir.path().display().to_string()], 2);
        assert!(said.contains("part-00000.parquet"), "{said}");
    }
    fs::write(&shard, b"PAR1 no").unwrap();
    assert!(message(&["stats", &shard.display().to_string()], 2).contains("Parquet"));
    assert!(message(&["stats", "nowhere"], 2).contains("nowhere"));
}

const N: usize = 4;

fn tokenizer() -> Tokenizer {
    Tokenizer::load(&WORLD.path().join("model")).unwrap()
}

fn provenance() -> Provenance {
    Provenance {
        teacher: "t".into(),
        tokenizer: tokenizer().fingerprint().to_owned(),
        vocab_size: 300,
        n: N,
        max_new_tokens: 400,
        eos_ids: vec![0],
        seed: 1,
        prompts: "p".into(),
        toolkit: "0".into(),
        steps: vec![],
    }
}

/// A row whose blocks converge in three states: a wrong guess, one wrong half, the answer.
fn row(id: &str, response: &[i32]) -> Trajectory {
    let block = |(index, answer): (usize, &[i32])| {
        let mut last = answer.to_vec();
        last.resize(N, 9);
        let wrong = |from: usize| (0..N).map(|at| if at < from { last[at] } else { last[at] ^ 1 }).collect();
        Block { start: (index * N) as u32, states: vec![wrong(0), wrong(2), last.clone()] }
    };
    let prompt_ids = std::iter::once(4).chain(id.bytes().map(i32::from)).collect();
    Trajectory {
        sample_id: id.into(),
        source: "jsonl/train".into(),
        prompt: id.into(),
        prompt_ids,
        response_ids: response.to_vec(),
        reference: None,
        blocks: response.chunks(N).enumerate().map(block).collect(),
        augmented: None,
        finish_reason: if response.ends_with(&[0]) { FinishReason::Eos } else { FinishReason::Length },
        meta: None,
    }
}

fn made(rows: &[Trajectory]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let mut writer = Writer::open(dir.path(), provenance()).unwrap();
    writer.write_shard(rows).unwrap();
    writer.finish().unwrap();
    dir
}

#[test]
fn augment_keeps_the_first_wrong_token_and_the_fixed_point() {
    let response: Vec<i32> = (10..49).chain([0]).collect();
    let input = made(&[row("a", &response), row("b", &response)]);
    let (once, again) = (path(input.path(), "once"), path(input.path(), "again"));
    for output in [&once, &again] {
        run(&["augment", &format!("input={}", input.path().display()), &format!("output={output}"), "seed=5"])
            .success();
    }
    let changed = rows(&once);
    assert_eq!(changed, rows(&again));
    let mut flagged = 0;
    for (before, after) in rows(&input.path().display().to_string()).iter().zip(&changed) {
        for (index, (old, new)) in before.blocks.iter().zip(&after.blocks).enumerate() {
            let fixed = old.states.last().unwrap();
            assert_eq!(new.states.last(), Some(fixed));
            for (state, (old, new)) in old.states.iter().zip(&new.states).enumerate() {
                let first_wrong = old.iter().zip(fixed).position(|(a, b)| a != b);
                assert_eq!(new.iter().zip(fixed).position(|(a, b)| a != b), first_wrong);
                assert!((0..N).all(|at| new[at] == old[at] || new[at] == fixed[at]));
                assert_eq!(after.augmented.as_ref().unwrap()[index][state], old != new);
                flagged += usize::from(old != new);
            }
        }
    }
    assert!(flagged > 0);
}

#[test]
fn every_clean_rule_drops_its_row_and_a_good_one_stays() {
    let text = |text: &str| [tokenizer().encode(text).unwrap(), vec![0]].concat();
    let ended = |ids: Vec<i32>| [ids, vec![0]].concat();
    let good: Vec<i32> = (40..80).collect();
    let mut wrong = row("wrong", &text("It is 5. #### 5"));
    (wrong.source, wrong.reference) = ("gsm8k/train".into(), Some("#### 7".into()));
    let (lines, eval) = (path(WORLD.path(), "eval.jsonl"), path(WORLD.path(), "eval.parquet"));
    let sample = json!({ "id": "e", "source": "jsonl/test", "prompt": "known" });
    fs::write(&lines, sample.to_string()).unwrap();
    run(&["prepare", "jsonl", "--data", &lines, "--output", &eval]).success();
    let mut known = row("known", &ended(good.clone()));
    known.prompt_ids = tokenizer().encode_prompt(&cllm_core::prompt_set::Prompt::Text("known".into())).unwrap().1;
    let mut again = row("again", &ended(good.clone()));
    again.prompt_ids = row("good", &[0]).prompt_ids;
    let loops: Vec<i32> = (0..8).flat_map(|turn| (40..55).chain([60 + turn]).collect::<Vec<_>>()).collect();
    let input = made(&[
        row("good", &ended(good.clone())),
        row("empty", &[0]),
        row("unfinished", &good),
        row("run", &ended([good.clone(), vec![40; 12], vec![90, 91]].concat())),
        row("grams", &ended(loops)),
        row("tail", &ended([good.clone(), [60, 61, 62].repeat(4)].concat())),
        row("sentence", &text("Tom has many apples. a b c. Tom has many apples. d e f g. Tom has many apples. h")),
        wrong,
        known,
        again,
    ]);
    let output = path(input.path(), "clean");
    let arguments = [
        "clean".to_owned(),
        format!("input={}", input.path().display()),
        format!("output={output}"),
        format!("model={}", path(WORLD.path(), "model")),
        format!("evaluation_prompts=[{eval}]"),
        "drop_incorrect=true".to_owned(),
        "keep_dropped=true".to_owned(),
        "--json".to_owned(),
    ];
    let report = json_of(&arguments.each_ref().map(String::as_str));
    let dropped = fs::read_to_string(Path::new(&output).join("dropped.jsonl")).unwrap();
    let dropped: Vec<Value> = dropped.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let mut rules: Vec<_> = dropped
        .iter()
        .map(|line| (line["row"]["sample_id"].as_str().unwrap(), line["rule"].as_str().unwrap()))
        .collect();
    rules.sort_unstable();
    let mut expected = vec![
        ("again", "duplicate"),
        ("empty", "empty"),
        ("grams", "repeated_4grams"),
        ("known", "evaluation_prompt"),
        ("run", "token_run"),
        ("sentence", "repeated_sentence"),
        ("tail", "periodic_tail"),
        ("unfinished", "unfinished"),
        ("wrong", "incorrect_answer"),
    ];
    expected.sort_unstable();
    assert_eq!(rules, expected);
    assert_eq!((&report["kept"], &report["dropped"]), (&json!(1), &json!(9)));
    assert!(rules.iter().all(|(_, rule)| report["rules"][rule] == 1));
    assert_eq!(rows(&output)[0].sample_id, "good");
}

#[test]
fn exported_rows_come_back_by_import() {
    let dir = tempfile::tempdir().unwrap();
    let (data, file, back) = (path(dir.path(), "a"), path(dir.path(), "a.json"), path(dir.path(), "b"));
    collect(&data, &["limit=5"]);
    run(&["export", &data, "--output", &file]).success();
    let model = path(WORLD.path(), "model");
    run(&["import", &file, "--model", &model, "--output", &back]).success();
    assert_eq!(rows(&data), rows(&back));
    fs::write(&file, "[{\"data_id\": 3}]").unwrap();
    let said = message(&["import", &file, "--model", &model, "--output", &path(dir.path(), "c")], 2);
    assert!(said.contains("a.json"), "{said}");
}

#[test]
fn files_of_the_reference_implementation_are_read() {
    let dir = tempfile::tempdir().unwrap();
    let (file, output) = (path(dir.path(), "r.json"), path(dir.path(), "a"));
    // Its first prompt is wrapped once more than the others, blocks run on after EOS, and cleaning leaves gaps.
    let record = |id: &str, block: usize, prompt: Value, states: Value| {
        json!({ "data_id": id, "jacobian_itr_id": format!("itr_{block}"), "prompt_ids_len": [2], "prompt_ids": prompt,
            "answer_trajectory_ids": states, "teacher_output_ids": [[0]] })
    };
    let records = json!([
        record("data_0", 0, json!([[[7, 8]]]), json!([[9, 9], [5, 6]])),
        record("data_0", 1, json!([[7, 8, 5, 6]]), json!([[9, 9], [0, 33]])),
        record("data_1", 1, json!([[7, 8, 5, 6]]), json!([[5, 6]])),
        record("data_2", 0, json!([[[7, 9]]]), json!([[5, 6]])),
        record("data_2", 2, json!([[7, 9, 5, 6, 5, 6]]), json!([[5, 6]])),
    ]);
    fs::write(&file, records.to_string()).unwrap();
    run(&["import", &file, "--model", &path(WORLD.path(), "model"), "--output", &output]).success();
    let found = rows(&output);
    assert_eq!(found.iter().map(|row| row.response_ids.clone()).collect::<Vec<_>>(), [vec![5, 6, 0], vec![5, 6]]);
    assert_eq!(found[0].finish_reason, FinishReason::Eos);
    assert_eq!(found[0].prompt_ids, [7, 8]);
}

#[test]
fn inspect_marks_what_is_early_and_what_is_wrong() {
    let mut shown = row("a", &[5, 6, 7, 0]);
    shown.blocks[0].states = vec![vec![5, 9, 7, 1], vec![5, 6, 7, 0]];
    let dir = made(&[row("first", &[5, 6, 7, 0]), shown]);
    let data = dir.path().display().to_string();
    let output = run(&["inspect", &data, "--sample", "a"]).success();
    let text = String::from_utf8(output.get_output().stdout.clone()).unwrap();
    assert!(text.contains("5 -9 +7 -1\n") && !text.contains('\u{1b}'), "{text}");
    let states = &json_of(&["inspect", &data, "--sample", "a", "--json"])["blocks"][0]["states"];
    assert_eq!(states[0]["standings"], json!(["final", "wrong", "early", "wrong"]));
    assert!(message(&["inspect", &data, "--sample", "b"], 2).contains("`b`"));
}

#[test]
fn help_of_every_verb_ends_with_an_example() {
    for verb in ["prepare", "collect", "augment", "clean", "validate", "stats", "inspect", "import", "export"] {
        let output = run(&[verb, "--help"]).success();
        let help = String::from_utf8(output.get_output().stdout.clone()).unwrap();
        assert!(help.contains(&format!("Example:\n  cllm-data {verb} ")), "{verb}");
    }
}
