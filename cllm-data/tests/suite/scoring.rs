//! Scoring in `collect` and `clean` that needs the benchmark's files.

use std::fs;

use cllm_core::trajectory::Trajectory;
use cllm_testing::programs::path;
use serde_json::{Value, json};

use crate::fixtures::{collect, row, run_error, run_json, teacher, tokenizer, write_data_set};

#[test]
fn spider_is_scored_if_its_databases_are_given() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("spider");
    fs::create_dir_all(data.join("database/zoo")).unwrap();
    let database = rusqlite::Connection::open(data.join("database/zoo/zoo.sqlite")).unwrap();
    database.execute_batch("CREATE TABLE pen (id); INSERT INTO pen VALUES (1), (2);").unwrap();
    let question = |id: &str, answer: &str| Trajectory {
        source: "spider/train".into(),
        reference: Some("SELECT count(*) FROM pen".into()),
        reference_ids: None,
        meta: Some(json!({ "db_id": "zoo" }).to_string()),
        ..row(id, &[tokenizer().encode(answer).unwrap(), vec![0]].concat())
    };
    let input = write_data_set(&[question("correct", "SELECT 2"), question("incorrect", "SELECT 3")]);
    let model = teacher();
    let clean = |name: &str, given: &str| {
        let (from, to) = (format!("input={}", input.path().display()), format!("output={}", path(dir.path(), name)));
        run_json(&["clean", &from, &to, &format!("model={model}"), given, "drop_incorrect=true", "--json"])
    };
    assert_eq!(clean("scored", &format!("data={}", data.display()))["rules"], json!({ "incorrect_answer": 1 }));
    assert_eq!(clean("unscored", "data=null")["kept"], 2);
    assert_eq!(clean("unscored", "data=null")["kept"], 2);
    // What would be dropped now must not pass for cleaned, nor the other way round.
    for (name, given, said) in [
        ("unscored", format!("data={}", data.display()), "was made by clean with data=false; this command says true"),
        ("scored", "data=null".to_owned(), "was made by clean with data=true; this command says false"),
    ] {
        let (from, to) = (format!("input={}", input.path().display()), format!("output={}", path(dir.path(), name)));
        let error = run_error(&["clean", &from, &to, &format!("model={model}"), &given, "drop_incorrect=true"], 2);
        assert!(error.contains(said) && error.contains("choose another output folder"), "{error}");
    }
    // Only `drop_incorrect` looks at it.
    let (from, to) = (format!("input={}", input.path().display()), format!("output={}", path(dir.path(), "all")));
    for given in ["data=null".to_owned(), format!("data={}", data.display())] {
        assert_eq!(run_json(&["clean", &from, &to, &format!("model={model}"), &given, "--json"])["kept"], 2);
    }

    let prompts = path(dir.path(), "prompts.jsonl");
    let prompt = |database: &str| {
        json!({ "id": "a", "source": "spider/train", "prompt": "How many?", "reference": "SELECT count(*) FROM pen",
            "meta": { "db_id": database } })
    };
    fs::write(&prompts, prompt("zoo").to_string()).unwrap();
    let given = [format!("prompts={prompts}"), format!("data={}", data.display())];
    let scored = collect(&path(dir.path(), "a"), &given.each_ref().map(String::as_str));
    assert_eq!((&scored["run"]["scored"], &scored["run"]["accuracy"]), (&json!(1), &json!(0.0)));
    let again = collect(&path(dir.path(), "a"), &given.each_ref().map(String::as_str));
    assert_eq!((&again["run"]["rows"], &again["total"]), (&json!(0), &scored["total"]));
    assert_eq!(collect(&path(dir.path(), "b"), &[&given[0]])["total"]["accuracy"], Value::Null);
    // As `prepare --variants` makes them: there is nothing to score with.
    let mut variant = prompt("zoo");
    variant.as_object_mut().unwrap().retain(|key, _| !["reference", "meta"].contains(&key.as_str()));
    fs::write(&prompts, variant.to_string()).unwrap();
    let unscored = collect(&path(dir.path(), "variants"), &given.each_ref().map(String::as_str));
    assert_eq!((&unscored["total"]["rows"], &unscored["total"]["scored"]), (&json!(1), &json!(0)));
    fs::write(&prompts, prompt("aquarium").to_string()).unwrap();
    let output = format!("output={}", path(dir.path(), "c"));
    let said = run_error(&["collect", &format!("model={model}"), &given[0], &given[1], &output], 2);
    assert!(said.contains("aquarium.sqlite") && said.contains("`a`"), "{said}");
}
