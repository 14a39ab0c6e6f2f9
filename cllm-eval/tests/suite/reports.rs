//! Reports of made-up results.

use cllm_core::atomic_file;
use cllm_eval::records::SAMPLES;
use cllm_eval::report::report;
use cllm_eval::results::{RESULTS, Results};
use serde_json::Value;

use crate::made_up::records;

/// The four files of the report of the made-up records: Markdown, page, LaTeX, card.
pub fn drawn() -> (tempfile::TempDir, [String; 4]) {
    let dir = tempfile::tempdir().unwrap();
    let records = records();
    records.write(&dir.path().join(SAMPLES)).unwrap();
    atomic_file::write_json(&dir.path().join(RESULTS), &Results::of(&records)).unwrap();
    let written = report(&[dir.path().to_owned()], None).unwrap();
    let names = ["report.md", "report.html", "report.tex", "model-card.md"];
    assert_eq!(written, names.map(|name| dir.path().join(name)));
    let texts = names.map(|name| std::fs::read_to_string(dir.path().join(name)).unwrap());
    (dir, texts)
}

#[test]
fn a_report_holds_the_figures_names_no_address_and_escapes_answers() {
    let (_dir, [markdown, page, tex, card]) = drawn();
    for text in [&markdown, &page] {
        assert!(text.contains("75.0 %") && text.contains("4.00x"), "{text}");
        assert!(text.contains("speedup_vs_teacher_ar") && text.contains("max_new_tokens"), "{text}");
        assert!(text.contains("AUP of t: "), "{text}");
    }
    for address in ["http:", "https:", "//", "src=", "href=", "url(", "@import"] {
        assert!(!page.contains(address), "{address}");
    }
    assert!(page.contains("prefers-color-scheme: dark") && page.matches("<svg").count() >= 8 && !page.contains("NaN"));
    assert!(
        page.contains("2 &amp; 2 &lt;b&gt;?") && !page.contains("<b>") && !page.contains("<script>alert"),
        "{page}"
    );
    assert!(page.contains(r#"title="forward 1, 4 tokens""#), "{page}");
    // The headline is the student's fastest, with what it cost.
    assert!(
        page.contains(r#"<div class="figure">4.00x</div>"#) && page.contains("1 of 4 answers unfinished (teacher: 1)"),
        "{page}"
    );
    assert!(tex.contains(r"75.0 \% (30.1 to 95.4)") && tex.contains(r"\toprule") && !tex.contains(" % "), "{tex}");
    assert!(card.contains("| student | jacobi n=4 |"), "{card}");
}

#[test]
fn the_card_begins_with_what_the_hub_reads() {
    let (_dir, [.., card]) = drawn();
    let front = card.strip_prefix("---\n").and_then(|rest| rest.split_once("\n---\n")).unwrap().0;
    let value: Value = serde_saphyr::from_str(front).unwrap();
    assert_eq!((&value["library_name"], &value["base_model"]), (&"transformers".into(), &"t".into()), "{front}");
    let result = &value["model-index"][0]["results"][0];
    assert_eq!(value["model-index"][0]["name"], "s");
    assert_eq!(result["task"]["type"], "text-generation");
    assert_eq!((&result["dataset"]["type"], &result["dataset"]["split"]), (&"jsonl".into(), &"test".into()));
    let metrics: Vec<(&str, f64)> = result["metrics"]
        .as_array()
        .unwrap()
        .iter()
        .map(|metric| (metric["type"].as_str().unwrap(), metric["value"].as_f64().unwrap()))
        .collect();
    assert_eq!(metrics, [("accuracy", 50.0), ("tokens_per_forward", 4.0), ("speedup", 4.0)]);
}

#[test]
fn results_and_samples_of_another_version_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let (results, samples) = (dir.path().join(RESULTS), dir.path().join(SAMPLES));
    let mut records = records();
    records.write(&samples).unwrap();
    let mut value = serde_json::to_value(Results::of(&records)).unwrap();
    value["schema_version"] = 7.into();
    atomic_file::write_json(&results, &value).unwrap();
    let error = report(std::slice::from_ref(&results), None).unwrap_err();
    assert!(error.exit_code() == 2 && error.to_string().contains("results.json: has schema version 7"), "{error}");
    value["schema_version"] = 1.into();
    atomic_file::write_json(&results, &value).unwrap();
    records.header.schema_version = 8;
    records.write(&samples).unwrap();
    let error = report(&[results], None).unwrap_err().to_string();
    assert!(error.contains("samples.jsonl: has schema version 8"), "{error}");
}

#[test]
fn a_file_of_another_kind_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("other.json");
    std::fs::write(&path, "{}").unwrap();
    let error = report(&[path], None).unwrap_err();
    assert!(error.exit_code() == 2 && error.to_string().contains("other.json"), "{error}");
}
