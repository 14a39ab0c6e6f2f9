//! `tradeoff` on made-up results, and the recipe that produces real ones.

use std::path::PathBuf;

use cllm_core::atomic_file;
use cllm_eval::records::{ModelEntry, Records};
use cllm_eval::results::{RESULTS, Results};
use cllm_eval::tradeoff::{self, Tradeoff};
use serde_json::Value;

use crate::made_up::{model, records};
use cllm_testing::programs::{Program, path};

const EVAL: Program = Program("cllm-eval");

fn results(change: impl Fn(&mut Records)) -> Results {
    let mut records = records();
    records.header.models[1].fingerprint = "g".into();
    change(&mut records);
    Results::from_records(&records)
}

#[test]
fn points_front_and_area_follow_from_the_results() {
    let tradeoff = Tradeoff::from_results(&[results(|_| ())]).unwrap();
    let points: Vec<_> = tradeoff
        .points
        .iter()
        .map(|point| {
            let figures = (point.accuracy, point.tokens_per_forward, point.speedup);
            (point.checkpoint.as_str(), point.strategy.as_str(), figures, point.on_front)
        })
        .collect();
    let expected = [
        ("t", "ar", (0.75, 1.0, Some(1.0)), false),
        ("t", "jacobi n=4", (0.75, 2.0, Some(2.0)), true),
        ("s", "ar", (0.5, 1.0, Some(1.0)), false),
        ("s", "jacobi n=4", (0.5, 4.0, Some(4.0)), true),
    ];
    assert_eq!(points, expected);
    // Teacher: 75 + 1 · 75. Student: 50 + 3 · 50 · exp(-3 (1 - 50/75)) = 50 + 150 / e.
    let areas: Vec<f64> = tradeoff.aup.iter().map(|curve| curve.aup).collect();
    assert!((areas[0] - 150.0).abs() < 1e-9 && (areas[1] - (50.0 + 150.0 / 1f64.exp())).abs() < 1e-9, "{areas:?}");
    let text = tradeoff.text();
    assert!(text.contains("AUP 150.0, over 2 points") && text.contains("75.0 %"), "{text}");
}

#[test]
fn a_checkpoint_measured_twice_counts_once_and_a_model_without_a_teacher_is_its_own_baseline() {
    let once = Tradeoff::from_results(&[results(|_| ())]).unwrap();
    assert_eq!(Tradeoff::from_results(&[results(|_| ()), results(|_| ())]).unwrap(), once);
    let alone = results(|records| drop(records.header.models.remove(0)));
    let speedups: Vec<_> = Tradeoff::from_results(&[alone]).unwrap().points.iter().map(|point| point.speedup).collect();
    assert_eq!(speedups, [Some(1.0), Some(4.0)]);
    assert_eq!(Tradeoff::from_results(&[]), None);
}

#[test]
fn all_speed_ups_of_a_table_are_over_one_baseline_which_is_named() {
    // The second run has another teacher, which decodes twice as fast.
    let other_teacher = |records: &mut Records| {
        records.header.models[0] =
            ModelEntry { path: "u".into(), fingerprint: "u".into(), ..records.header.models[0].clone() };
        records.header.models[1] =
            ModelEntry { path: "v".into(), fingerprint: "v".into(), ..records.header.models[1].clone() };
        records.speeds.iter_mut().for_each(|speed| speed.seconds /= 2.0);
    };
    let of_chats = results(|records| records.header.settings.prompts = Some("runs/chats.jsonl".into()));
    let tradeoff = Tradeoff::from_results(&[of_chats, results(other_teacher)]).unwrap();
    let baseline = tradeoff.baseline.as_ref().unwrap();
    assert_eq!((baseline.checkpoint.as_str(), baseline.tokens_per_second), ("t", Some(1.0)));
    for point in &tradeoff.points {
        assert_eq!(point.speedup, point.tokens_per_second, "{point:?}");
    }
    assert!(tradeoff.text().starts_with("4 examples of chats.jsonl / test\n"), "{}", tradeoff.text());
    assert!(
        tradeoff.text().contains("speed-ups are over autoregressive decoding of t (1.0 tokens/s)"),
        "{}",
        tradeoff.text()
    );
    // Times of another machine have no ratio to a baseline that it did not run.
    let elsewhere = results(|records| {
        other_teacher(records);
        records.header.hardware.cpu = "another".into();
    });
    let tradeoff = Tradeoff::from_results(&[results(|_| ()), elsewhere]).unwrap();
    assert!(
        tradeoff.points.iter().all(|point| point.speedup.is_some() == ["t", "s"].contains(&point.checkpoint.as_str()))
    );
}

#[test]
fn results_with_different_examples_or_settings_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let written = |name: &str, results: Results| {
        std::fs::create_dir_all(dir.path().join(name)).unwrap();
        let file = dir.path().join(name).join(RESULTS);
        atomic_file::write_json(&file, &results).unwrap();
        file
    };
    let first = written("first", results(|_| ()));
    let refused = |change: &dyn Fn(&mut Records), word: &str| {
        let other = written("other", results(change));
        let error = tradeoff::read(&[first.clone(), other]).unwrap_err().to_string();
        assert!(error.contains("other/results.json") && error.contains(word), "{error}");
    };
    refused(&|records| records.header.split = "dev".into(), "split=dev, the first results have test");
    refused(&|records| records.header.examples = 3, "examples=3");
    refused(&|records| records.header.settings.max_new_tokens = 7, "max_new_tokens=7");
    refused(&|records| records.header.settings.temperature = 0.5, "temperature=0.5");
    let folder = first.parent().unwrap().to_owned();
    assert_eq!(tradeoff::read(&[folder]).unwrap(), Tradeoff::from_results(&[results(|_| ())]).unwrap());
    let unscored = written("unscored", results(|records| records.answers.clear()));
    let message = |files: &[PathBuf]| tradeoff::read(files).unwrap_err().to_string();
    let alone = message(std::slice::from_ref(&unscored));
    assert!(alone.contains("unscored/results.json: holds no scored answer"), "{alone}");
    let also = written("also", results(|records| records.answers.clear()));
    let both = message(&[unscored.clone(), also.clone()]);
    let expected = format!("none of {}, {} holds a scored answer", unscored.display(), also.display());
    assert!(both.contains(&expected), "{both}");
    std::fs::write(&first, "{}").unwrap();
    assert!(tradeoff::read(&[first]).unwrap_err().to_string().contains("is not a results.json"));
}

#[test]
fn the_recipe_sweeps_n_and_its_results_can_be_read_and_compared() {
    let dir = tempfile::tempdir().unwrap();
    model(&dir.path().join("teacher"), 1);
    model(&dir.path().join("student"), 2);
    let setting = |name: &str| format!("{name}={}", path(dir.path(), name));
    let recipe = concat!(env!("CARGO_MANIFEST_DIR"), "/../configs/sweep.yaml").to_owned();
    let small = ["num_problems=2", "num_speed_examples=1", "max_new_tokens=6", "device=cpu"].map(str::to_owned);
    let run = ["run".to_owned(), "-c".to_owned(), recipe, setting("teacher"), setting("student"), setting("output")];
    EVAL.succeed(&[&run[..], &small].concat());
    let output = path(dir.path(), "output");
    let tradeoff: Value = serde_json::from_slice(&EVAL.succeed(&["tradeoff", &output, "--json"]).stdout).unwrap();
    let points = tradeoff["points"].as_array().unwrap();
    let of_student: Vec<&Value> = points.iter().filter(|point| point["role"] == "student").collect();
    let widths = |name: &str| {
        let mine = |point: &&&Value| point["strategy"].as_str().unwrap().starts_with(name);
        let mut widths: Vec<_> =
            of_student.iter().filter(mine).map(|point| point["max_tokens_per_forward"].as_u64()).collect();
        widths.sort_unstable();
        widths
    };
    assert_eq!(widths("ar"), [Some(1)]);
    assert_eq!(widths("jacobi"), [Some(4), Some(8), Some(16), Some(32)]);
    assert!(widths("rolling").len() > 2 && widths("multiblock").len() > 1, "{tradeoff:#}");
    assert_eq!(tradeoff["aup"].as_array().unwrap().len(), 2);
    let page = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/data-format.md")).unwrap();
    let compared: Value = serde_json::from_slice(&EVAL.succeed(&["compare", &output, "--json"]).stdout).unwrap();
    assert_eq!((&compared["pairs"], &compared["speed"]["examples"]), (&2.into(), &1.into()));
    let documents = [
        &tradeoff,
        &tradeoff["baseline"],
        &points[0],
        &tradeoff["aup"][0],
        &compared,
        &compared["a"],
        &compared["speed"],
    ]
    .map(Value::as_object);
    for key in documents.into_iter().flat_map(|document| document.unwrap().keys()) {
        assert!(page.contains(&format!("`{key}`")), "{key} is missing in docs/data-format.md");
    }
    EVAL.succeed(&["tradeoff", &output]);
    EVAL.succeed(&["compare", &output]);
}
