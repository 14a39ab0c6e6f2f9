//! Thinking models: thoughts that are closed at their limit, from `collect` to `inspect`.

use std::fs;
use std::path::Path;

use cllm_core::checkpoint;
use cllm_core::decode::{DecodeOptions, Request, StopConditions, Strategy, decode};
use cllm_core::thought::{Thought, ThoughtLimit};
use cllm_core::tokenizer::Tokenizer;
use cllm_core::trajectory::{Provenance, Reader, Trajectory, Writer};
use cllm_testing::programs::path;
use serde_json::{Value, json};

use crate::fixtures::{prompt_set, provenance, row, rows, run, run_error, run_json, run_text, shard, teacher};

/// A thinking teacher in `model` and eight prompts in `prompts.jsonl`, of which six have opened the
/// thought of the answer.
fn folder() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model");
    fs::create_dir(&model).unwrap();
    for file in fs::read_dir(teacher()).unwrap() {
        let file = file.unwrap();
        fs::copy(file.path(), model.join(file.file_name())).unwrap();
    }
    cllm_testing::add_thought_tokens(&model);
    let prompt = |index: usize| {
        let opening = if index < 6 { "<think>\n" } else { "" };
        json!({ "id": format!("p{index}"), "prompt": format!("{index} apples{opening}"), "reference": "7" }).to_string()
    };
    fs::write(dir.path().join("prompts.jsonl"), (0..8).map(prompt).collect::<Vec<_>>().join("\n")).unwrap();
    dir
}

fn arguments(dir: &Path, output: &str, more: &[&str]) -> Vec<String> {
    let paths = ["model", "prompts"].map(|name| {
        let file = if name == "prompts" { "prompts.jsonl" } else { name };
        format!("{name}={}", path(dir, file))
    });
    let fixed = ["n=4", "max_new_tokens=40", "device=cpu", "rows_per_shard=4"].map(str::to_owned);
    let output = format!("output={}", path(dir, output));
    let words = ["collect", "--json"].map(str::to_owned).into_iter().chain(paths).chain(fixed).chain([output]);
    words.chain(more.iter().map(|&word| word.to_owned())).collect()
}

fn collect(dir: &Path, output: &str, more: &[&str]) -> Value {
    let words = arguments(dir, output, more);
    run_json(&words.iter().map(String::as_str).collect::<Vec<_>>())
}

fn is_closed(row: &Trajectory) -> bool {
    !row.forced_tokens().is_empty()
}

#[test]
fn a_thought_is_closed_at_its_limit_and_every_verb_reads_the_rows() {
    let dir = folder();
    let summary = collect(dir.path(), "a", &["max_thinking_tokens=8"]);
    let data = path(dir.path(), "a");
    let collected = rows(&data);
    let closed: Vec<&Trajectory> = collected.iter().filter(|row| is_closed(row)).collect();
    assert!(closed.len() > 2 && closed.len() <= 6, "{} thoughts were closed", closed.len());
    let tokenizer = Tokenizer::load(&dir.path().join("model")).unwrap();
    let closing = tokenizer.encode("\n</think>\n\n").unwrap();
    for row in &closed {
        assert_eq!(row.forced_tokens(), 8..8 + closing.len());
        assert_eq!(row.response_ids[row.forced_tokens()], closing);
        assert_eq!(row.num_decoded_tokens() + closing.len(), row.response_ids.len());
    }
    assert_eq!(summary["total"]["closed_thoughts"], closed.len());
    let decoded: usize = collected.iter().map(Trajectory::num_decoded_tokens).sum();
    let forwards = summary["total"]["forwards"].as_f64().unwrap();
    assert_eq!(summary["total"]["tokens_per_forward"], decoded as f64 / forwards);

    run(&["validate", &data]).success();
    let stats = run_json(&["stats", &data, "--json"]);
    for key in ["rows", "unfinished", "closed_thoughts", "response_tokens", "blocks", "tokens_per_forward"] {
        assert_eq!(stats[key], summary["total"][key], "{key}");
    }
    assert!(run_text(&["stats", &data]).contains(&format!(", {} thoughts closed at the limit", closed.len())));
    let id = &closed[0].sample_id;
    assert!(
        run_text(&["inspect", &data, "--sample", id]).contains("the thought was closed at its limit, from token 8\n")
    );
    assert_eq!(run_json(&["inspect", &data, "--sample", id, "--json"])["forced"]["start"], 8);
    let augmented = path(dir.path(), "augmented");
    run(&["augment", &format!("input={data}"), &format!("output={augmented}")]).success();
    run(&["validate", &augmented]).success();
    assert_eq!(rows(&augmented).iter().filter(|row| is_closed(row)).count(), closed.len());
}

#[test]
fn export_then_import_keeps_the_tokens_that_closed_a_thought() {
    let dir = folder();
    collect(dir.path(), "a", &["max_thinking_tokens=8"]);
    let (data, file, again) = (path(dir.path(), "a"), path(dir.path(), "a.json"), path(dir.path(), "again"));
    run(&["export", &data, "--output", &file]).success();
    run(&["import", &file, "--output", &again]).success();
    assert_eq!(rows(&again), rows(&data));
    run(&["validate", &again]).success();
}

#[test]
fn collected_answers_equal_autoregressive_ones_with_the_same_limit() {
    let dir = folder();
    collect(dir.path(), "a", &["max_thinking_tokens=8"]);
    let folder = dir.path().join("model");
    let tokenizer = Tokenizer::load(&folder).unwrap();
    let model = checkpoint::load(&folder, tch::Device::Cpu, tch::Kind::Float).unwrap();
    let stop = StopConditions {
        thought_limit: Some(ThoughtLimit::new(&tokenizer, 8, 40).unwrap()),
        ..StopConditions::new(40, tokenizer.eos_ids().to_vec())
    };
    for row in rows(&path(dir.path(), "a")) {
        let request = Request { sample_id: row.sample_id.clone(), prompt_ids: row.prompt_ids.clone() };
        let (answers, _) = decode(&model, &[request], &stop, DecodeOptions::greedy(Strategy::Ar, 0)).unwrap();
        assert_eq!(answers[0].response_ids, row.response_ids);
        assert_eq!(matches!(answers[0].thought, Some(Thought::Forced(_))), is_closed(&row));
    }
}

#[test]
fn batches_and_a_stop_change_nothing_and_another_limit_is_refused() {
    let dir = folder();
    let limit = "max_thinking_tokens=8";
    let summary = collect(dir.path(), "a", &[limit]);
    collect(dir.path(), "b", &[limit, "batch_size=3"]);
    let files = |folder: &str| [0, 1].map(|index| fs::read(shard(&path(dir.path(), folder), index)).unwrap());
    assert!(files("a") == files("b"));
    fs::remove_file(shard(&path(dir.path(), "b"), 1)).unwrap();
    let resumed = collect(dir.path(), "b", &[limit]);
    assert_eq!((&resumed["resumed"], &resumed["total"]), (&json!(4), &summary["total"]));
    assert!(files("a") == files("b"));

    for (other, difference) in [
        ("max_thinking_tokens=12", "was started with max_thinking_tokens=8; this command says 12"),
        ("max_thinking_tokens=null", "was started with max_thinking_tokens=8; this command says null"),
    ] {
        let words = arguments(dir.path(), "b", &[other]);
        let message = run_error(&words.iter().map(String::as_str).collect::<Vec<_>>(), 2);
        assert!(message.contains(difference), "{message}");
    }
}

#[test]
fn without_a_limit_a_data_set_does_not_mention_thoughts() {
    let dir = folder();
    collect(dir.path(), "a", &[]);
    let reader = Reader::open(Path::new(&path(dir.path(), "a"))).unwrap();
    assert_eq!(reader.provenance().thought_closing, None);
    let manifest = fs::read_to_string(dir.path().join("a/manifest.json")).unwrap();
    assert!(!manifest.contains("thinking") && !manifest.contains("closing"), "{manifest}");
}

#[test]
fn a_limit_that_cannot_hold_is_refused_by_its_name() {
    let dir = folder();
    let refuse = |more: &[&str], parts: &[&str]| {
        let words = arguments(dir.path(), "a", more);
        let message = run_error(&words.iter().map(String::as_str).collect::<Vec<_>>(), 2);
        assert!(parts.iter().all(|part| message.contains(part)), "{message}");
    };
    refuse(&["max_thinking_tokens=10"], &["max_thinking_tokens", "multiple of n=4, such as 8 or 12"]);
    refuse(&["max_thinking_tokens=0"], &["max_thinking_tokens"]);
    refuse(&["max_thinking_tokens=40"], &["max_thinking_tokens=40", "do not fit into max_new_tokens=40"]);
    let other = [format!("model={}", teacher()), format!("prompts={}", prompt_set())];
    let other = [other[0].as_str(), &other[1], "max_thinking_tokens=8"];
    refuse(&other, &["max_thinking_tokens", "no tokens <think> and </think>"]);
}

#[test]
fn answers_that_end_inside_a_thought_are_counted_apart() {
    let dir = folder();
    let model = dir.path().join("model");
    let tokenizer = Tokenizer::load(&model).unwrap();
    let unfinished = |id: &str, response: &str| row(id, &tokenizer.encode(response).unwrap());
    let mut opened = unfinished("opened by the prompt", "Tom has 3 apples");
    opened.prompt_ids = tokenizer.encode("apples?<think>\n").unwrap();
    let ended = row("ended by EOS", &[tokenizer.encode("Tom has 7").unwrap(), vec![0]].concat());
    let ended = Trajectory { prompt_ids: opened.prompt_ids.clone(), ..ended };
    let rows = [
        unfinished("opened", "<think>\nTom has 3 apples"),
        opened,
        ended,
        unfinished("closed", "<think>\nTom</think>\n\nTom has 3 apples"),
        unfinished("no thought", "Tom has 3 apples"),
    ];
    let input = path(dir.path(), "input");
    let provenance = Provenance { tokenizer: tokenizer.fingerprint().to_owned(), ..provenance() };
    let mut writer = Writer::create(Path::new(&input), provenance).unwrap();
    writer.write_shard(&rows).unwrap();
    writer.finish().unwrap();
    let output = path(dir.path(), "clean");
    let paths = [format!("input={input}"), format!("output={output}"), format!("model={}", model.display())];
    let words = [&["clean", "--json"], &paths.each_ref().map(String::as_str)[..]].concat();
    // A data set without rows is a negative result.
    let dropped: Value = serde_json::from_slice(&run(&words).code(1).get_output().stdout).unwrap();
    assert_eq!(dropped["rules"], json!({ "unfinished": 2, "unfinished_thought": 3 }));
    let output = format!("output={}", path(dir.path(), "all"));
    assert_eq!(run_json(&[&words[..], &["drop_unfinished=false", &output]].concat())["kept"], 4);

    let summary = collect(dir.path(), "a", &[]);
    let cut = summary["total"]["unfinished_thoughts"].as_u64();
    assert!(cut > Some(0) && cut <= Some(6) && cut <= summary["total"]["unfinished"].as_u64(), "{summary}");
}
