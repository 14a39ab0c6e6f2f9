//! Continuous batching at several numbers of rows, as a user starts it.

use std::path::Path;

use cllm_eval::records::{Records, ThroughputRecord};
use cllm_eval::results::Results;
use cllm_eval::table::concurrency_columns;
use cllm_eval::terminal::summary;

use crate::made_up::{eloquent_model, program, records};
use cllm_testing::programs::{Program, path};

const EVAL: Program = Program("cllm-eval");

fn models(folder: &Path) {
    eloquent_model(&folder.join("teacher"), 1);
    eloquent_model(&folder.join("student"), 2);
}

fn run(folder: &Path, more: &[&str]) -> Results {
    let output = program()
        .current_dir(folder)
        .args(["run", "--quiet", "--json", "teacher=teacher", "student=student", "num_problems=10", "device=cpu"])
        .args(["max_new_tokens=12", "num_speed_examples=8", "strategies=[ar, {rolling: {n: 4}}]", "output=out"])
        .args(more)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// A repetition without the seconds.
fn work(record: &ThroughputRecord) -> String {
    let none = ThroughputRecord {
        prefill_seconds: 0.0,
        seconds: 0.0,
        answer_prefill_seconds: 0.0,
        answer_seconds: 0.0,
        ..record.clone()
    };
    format!("{none:?}")
}

#[test]
fn answers_in_a_batch_are_those_at_batch_1_and_every_figure_is_there() {
    let dir = tempfile::tempdir().unwrap();
    models(dir.path());
    let results = run(dir.path(), &["concurrency=[8, 1, 3]"]);
    let records = Records::read(&dir.path().join("out/samples.jsonl")).unwrap();
    // Two models with two strategies, at 3 and at 8 rows; one row is not measured again.
    assert_eq!(records.throughputs.len(), 3 * 4 * 2);
    for record in &records.throughputs {
        let alone: Vec<_> = records.speeds_of(record.role, record.strategy).collect();
        // The eight examples, until there are eight requests for each row.
        assert_eq!(alone.len(), 8);
        assert_eq!(record.answers, 8 * record.concurrency, "{record:?}");
        assert_eq!(record.tokens, record.concurrency * alone.iter().map(|one| one.tokens).sum::<usize>(), "{record:?}");
        assert_eq!(record.forwards, record.concurrency * alone.iter().map(|one| one.forwards).sum::<usize>());
    }
    for (_, strategy) in results.strategies() {
        let batches = strategy.concurrency.as_ref().unwrap();
        let shown: Vec<_> = batches.iter().map(|batch| (batch.concurrency, batch.repetitions)).collect();
        assert_eq!(shown, [(1, 1), (3, 3), (8, 3)]);
        let one = &batches[0];
        assert_eq!((one.tokens_per_second, one.answers), (strategy.tokens_per_second, strategy.speed_examples));
        assert_eq!(one.tokens_per_second_per_user, strategy.tokens_per_second);
        assert_eq!(one.speedup_vs_teacher_ar, strategy.speedup_vs_teacher_ar);
        assert_eq!(Some(one.end_to_end_seconds), strategy.end_to_end_seconds);
        for batch in batches {
            let rows = batch.mean_rows.unwrap();
            assert_eq!(rows > 1.0 + 1e-9, batch.concurrency > 1, "{rows}");
            assert!(rows < batch.concurrency as f64 + 1e-9, "{rows}");
            assert!(batch.unfinished <= batch.answers && batch.seconds < batch.end_to_end_seconds);
            let value = serde_json::to_value(batch).unwrap();
            assert!(value.as_object().unwrap().values().all(|figure| !figure.is_null()), "{value}");
        }
        if strategy.name == "ar" {
            assert!(batches.iter().all(|batch| batch.tokens_per_forward == Some(1.0)));
        }
    }
    let ar = results.models[0].autoregressive().unwrap();
    assert!(ar.concurrency.iter().flatten().all(|batch| batch.speedup_vs_teacher_ar == Some(1.0)));
}

#[test]
fn a_run_that_was_killed_amid_its_repetitions_makes_the_others() {
    let dir = tempfile::tempdir().unwrap();
    models(dir.path());
    run(dir.path(), &["concurrency=[2]"]);
    let samples = dir.path().join("out/samples.jsonl");
    let whole = Records::read(&samples).unwrap();
    let mut killed = whole.clone();
    killed.throughputs.retain(|record| record.repetition == 0);
    let last = killed.throughputs.pop().unwrap();
    killed.write(&samples).unwrap();
    run(dir.path(), &["concurrency=[2]"]);
    let resumed = Records::read(&samples).unwrap();
    assert_eq!(
        resumed.throughputs.iter().map(work).collect::<Vec<_>>(),
        whole.throughputs.iter().map(work).collect::<Vec<_>>()
    );
    assert!(killed.throughputs.iter().all(|record| resumed.throughputs.contains(record)), "made once");
    assert!(!resumed.throughputs.contains(&last));
    // Nothing is left to measure.
    let text = std::fs::read_to_string(&samples).unwrap();
    run(dir.path(), &["concurrency=[2]"]);
    assert_eq!(std::fs::read_to_string(&samples).unwrap(), text);
    // Other numbers of rows are added to what there is.
    let more = run(dir.path(), &["concurrency=[3, 1]"]);
    let rows = |results: &Results| -> Vec<usize> {
        results.models[0].strategies[0].concurrency.iter().flatten().map(|batch| batch.concurrency).collect()
    };
    assert_eq!(rows(&more), [1, 3]);
    let added = Records::read(&samples).unwrap();
    assert_eq!((&added.answers, &added.speeds), (&resumed.answers, &resumed.speeds));
    assert!(resumed.throughputs.iter().all(|record| added.throughputs.contains(record)), "measured once");
    assert_eq!(rows(&run(dir.path(), &["concurrency=[1, 2]"])), [1, 2]);
}

#[test]
fn numbers_of_rows_that_cannot_be_measured_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    models(dir.path());
    let refused = |more: &[&str], parts: &[&str]| {
        let fixed = ["run", "device=cpu", "num_problems=6", "num_speed_examples=4"].map(str::to_owned);
        let named = [("teacher", "teacher"), ("output", "out")];
        let named = named.map(|(key, name)| format!("{key}={}", path(dir.path(), name)));
        let more: Vec<String> = more.iter().map(|&one| one.to_owned()).collect();
        EVAL.fail(&[&fixed[..], &named, &more].concat(), 2, parts);
    };
    refused(&["concurrency=[1, 0]"], &["`concurrency=[1, 0]`: 0 rows answer nothing"]);
    refused(&["concurrency=[2, 1, 2]"], &["concurrency", "2 is listed twice"]);
    let few = "concurrency=5: only 4 examples would be timed";
    refused(&["concurrency=[1, 5]"], &[few, "raise num_speed_examples (there are 6 examples)"]);
    refused(&["concurrency=[7]", "num_speed_examples=9"], &["only 6 examples", "lower concurrency"]);
    refused(&["concurrency=[1]", "num_speed_examples=0"], &["only 0 examples", "raise num_speed_examples"]);
    assert!(!dir.path().join("out").exists());
}

#[test]
fn the_summary_has_a_row_for_each_model_strategy_and_number_of_rows() {
    let results = Results::from_records(&records());
    let text = summary(&results);
    assert!(text.contains("2.50x") && text.contains("Continuous batching"), "{text}");
    assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
    let (heads, rows) = concurrency_columns(&results);
    assert_eq!(rows.len(), 8);
    let row = ["student", "jacobi n=4", "2", "2.50x", "32.0", "18.3", "2.50x", "4.00", "21.3", "2.00x", "1 of 16"];
    assert_eq!((heads.len(), &rows[7][..]), (row.len(), &row.map(str::to_owned)[..]));
    let mut alone = results.clone();
    alone.models.iter_mut().flat_map(|model| &mut model.strategies).for_each(|figures| {
        figures.concurrency.iter_mut().flatten().for_each(|batch| batch.speedup_vs_student_ar = None);
    });
    assert!(!concurrency_columns(&alone).0.contains(&"speed-up over student AR"));
    let mut records = records();
    records.header.settings.concurrency.clear();
    let without = Results::from_records(&records);
    assert_eq!(without.models[0].strategies[0].concurrency, None);
    assert!(!summary(&without).contains("Continuous batching"));
}
