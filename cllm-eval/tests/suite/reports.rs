//! Reports of made-up results.

use cllm_core::atomic_file;
use cllm_eval::records::SAMPLES;
use cllm_eval::report::report;
use cllm_eval::results::{RESULTS, Results};

use crate::made_up::records;

#[test]
fn a_report_holds_the_figures_names_no_address_and_escapes_answers() {
    let dir = tempfile::tempdir().unwrap();
    let records = records();
    records.write(&dir.path().join(SAMPLES)).unwrap();
    atomic_file::write_json(&dir.path().join(RESULTS), &Results::of(&records)).unwrap();
    let written = report(&[dir.path().to_owned()], None).unwrap();
    assert_eq!(written, [dir.path().join("report.md"), dir.path().join("report.html")]);
    let [markdown, page] =
        ["report.md", "report.html"].map(|name| std::fs::read_to_string(dir.path().join(name)).unwrap());
    for text in [&markdown, &page] {
        assert!(text.contains("75.0 %") && text.contains("4.00x"), "{text}");
        assert!(text.contains("speedup_vs_teacher_ar") && text.contains("max_new_tokens"), "{text}");
    }
    for address in ["http:", "https:", "//", "src=", "href=", "url(", "@import"] {
        assert!(!page.contains(address), "{address}");
    }
    assert!(page.contains("prefers-color-scheme: dark") && page.matches("<svg").count() >= 4);
    assert!(page.contains("2 &amp; 2 &lt;b&gt;?") && !page.contains("<b>") && !page.contains("<script"), "{page}");
    assert!(page.contains(r#"title="forward 1, 4 tokens""#), "{page}");
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
