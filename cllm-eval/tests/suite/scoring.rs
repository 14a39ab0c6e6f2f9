//! Verdicts: what counts as correct, during a run and when its answers are scored again.

use std::fs;
use std::path::{Path, PathBuf};

use cllm_core::task::{Task, Verdict};
use cllm_core::thought::Thought;
use cllm_core::trajectory::FinishReason;
use cllm_core::{fingerprint, prompt_set};
use cllm_eval::config::RunSettings;
use cllm_eval::records::Records;
use serde_json::json;

use crate::made_up::{model, records};
use cllm_testing::programs::{Program, path};

const EVAL: Program = Program("cllm-eval");

fn read(output: &str) -> Records {
    Records::read(&Path::new(output).join("samples.jsonl")).unwrap()
}

#[test]
fn an_answer_cut_at_the_length_limit_is_incorrect_whatever_it_says() {
    let dir = tempfile::tempdir().unwrap();
    let (teacher, prompts) = (path(dir.path(), "teacher"), path(dir.path(), "prompts.jsonl"));
    model(Path::new(&teacher), 1);
    let run = |reference: &str, output: &str| {
        let row = json!({ "id": "a", "source": "jsonl/test", "prompt": "2 + 2 =", "reference": reference });
        fs::write(&prompts, row.to_string()).unwrap();
        let given = [format!("teacher={teacher}"), format!("prompts={prompts}"), format!("output={output}")];
        let fixed = ["run", "strategies=[ar]", "max_new_tokens=5", "num_speed_examples=0", "device=cpu"];
        EVAL.succeed(&[&fixed.map(str::to_owned)[..], &given].concat());
        read(output).answers.remove(0)
    };
    let text = run("?", &path(dir.path(), "first")).text;
    let output = path(dir.path(), "second");
    let answer = run(&text, &output);
    assert_eq!((&answer.text, answer.finish_reason), (&text, FinishReason::Length));
    assert_eq!(answer.verdict, Verdict::Incorrect);
    EVAL.succeed(&["score", &output]);
    assert_eq!(read(&output).answers[0].verdict, Verdict::Incorrect);
    // The same text is correct if the answer ended on its own.
    let mut records = read(&output);
    records.answers[0].finish_reason = FinishReason::Eos;
    records.write(&Path::new(&output).join("samples.jsonl")).unwrap();
    EVAL.succeed(&["score", &output]);
    assert_eq!(read(&output).answers[0].verdict, Verdict::Correct);
    // But not if all of it is a thought.
    records.answers[0].thought = Some(Thought::Open);
    records.write(&Path::new(&output).join("samples.jsonl")).unwrap();
    let text = String::from_utf8(EVAL.succeed(&["score", &output]).stdout).unwrap();
    assert!(text.contains("ar: 1 thought never closed"), "{text}");
    assert_eq!(read(&output).answers[0].verdict, Verdict::Incorrect);
}

/// Spider with one small database.
fn spider(folder: &Path) -> String {
    let database = folder.join("spider/database/zoo");
    fs::create_dir_all(&database).unwrap();
    let connection = rusqlite::Connection::open(database.join("zoo.sqlite")).unwrap();
    connection.execute_batch("CREATE TABLE pen (id, size); INSERT INTO pen VALUES (1, 5), (2, 9);").unwrap();
    path(folder, "spider")
}

#[test]
fn spider_is_scored_if_its_databases_are_there() {
    let dir = tempfile::tempdir().unwrap();
    let run = path(dir.path(), "run");
    fs::create_dir(&run).unwrap();
    let mut records = records();
    let expected: Vec<Verdict> = records.answers.iter().map(|answer| answer.verdict).collect();
    records.header.benchmark = Task::Spider;
    for answer in &mut records.answers {
        answer.source = "spider/dev".into();
        answer.meta = Some(json!({ "db_id": "zoo" }));
        answer.reference = Some("SELECT count(*) FROM pen".into());
        answer.text = if answer.verdict == Verdict::Correct { "SELECT 2".into() } else { "SELECT 3".into() };
        answer.verdict = Verdict::Unscored;
    }
    records.write(&Path::new(&run).join("samples.jsonl")).unwrap();
    let stderr = EVAL.succeed(&["score", &run]).stderr;
    assert!(stderr.contains("--data"), "{stderr}");
    assert!(read(&run).answers.iter().all(|answer| answer.verdict == Verdict::Unscored));
    EVAL.fail(&["score", &run, "--data", "no/such"], 2, &["no/such/database/zoo/zoo.sqlite", "data folder"]);
    let data = spider(dir.path());
    EVAL.succeed(&["score", &run, "--data", &data]);
    let verdicts: Vec<Verdict> = read(&run).answers.iter().map(|answer| answer.verdict).collect();
    assert_eq!(verdicts, expected);
    // The run remembers the folder.
    EVAL.succeed(&["score", &run]);
    assert_eq!(read(&run).answers[0].verdict, Verdict::Correct);
}

/// Whether a process that runs queries has computed for a while.
fn is_a_query_running() -> bool {
    let entries = fs::read_dir("/proc").unwrap().flatten().map(|entry| entry.path());
    let is_running = |process: PathBuf| {
        let line = fs::read(process.join("cmdline")).ok()?;
        let stat = fs::read_to_string(process.join("stat")).ok()?;
        let ticks: u32 = stat.split_whitespace().nth(13)?.parse().ok()?;
        Some(String::from_utf8_lossy(&line).contains("Queries") && ticks > 20)
    };
    entries.filter_map(is_running).any(|is_running| is_running)
}

#[test]
fn a_signal_ends_a_query_that_would_take_minutes() {
    let dir = tempfile::tempdir().unwrap();
    let (run, data) = (path(dir.path(), "run"), spider(dir.path()));
    fs::create_dir(&run).unwrap();
    let mut records = records();
    records.header.benchmark = Task::Spider;
    for answer in &mut records.answers {
        answer.source = "spider/dev".into();
        answer.meta = Some(json!({ "db_id": "zoo" }));
        answer.reference = Some("SELECT count(*) FROM pen".into());
        // One step of SQLite.
        answer.text = "SELECT instr(hex(zeroblob(8000000)), hex(zeroblob(4000000)) || '1')".into();
    }
    records.write(&Path::new(&run).join("samples.jsonl")).unwrap();
    for (signal, code) in [("TERM", 143), ("HUP", 129), ("INT", 130)] {
        EVAL.interrupt(&["score", &run, "--data", &data], signal, code, is_a_query_running);
        assert!(!is_a_query_running());
    }
}

#[test]
fn prompts_of_a_file_must_be_of_one_benchmark_which_the_results_name() {
    let dir = tempfile::tempdir().unwrap();
    let (teacher, prompts) = (path(dir.path(), "teacher"), path(dir.path(), "prompts.jsonl"));
    model(Path::new(&teacher), 1);
    let put = |sources: &[&str]| {
        let row = |(index, source): (usize, &&str)| {
            json!({ "id": index.to_string(), "source": source, "prompt": "2 + 2 =", "reference": "#### 4" }).to_string()
        };
        fs::write(&prompts, sources.iter().enumerate().map(row).collect::<Vec<_>>().join("\n")).unwrap();
    };
    let output = path(dir.path(), "output");
    let arguments = |more: &[&str]| {
        let given = [format!("teacher={teacher}"), format!("prompts={prompts}"), format!("output={output}")];
        let fixed = ["run", "strategies=[ar]", "max_new_tokens=5", "num_speed_examples=0", "device=cpu"];
        [&fixed.map(str::to_owned)[..], &given, &more.iter().map(|&word| word.to_owned()).collect::<Vec<_>>()].concat()
    };
    put(&["gsm8k/test", "gsm8k/test", "synthetic/test"]);
    EVAL.fail(
        &arguments(&[]),
        2,
        &["prompts.jsonl: prompt `2`", "`synthetic/test`", "the first prompt is of gsm8k", "file of its own"],
    );
    put(&["gsm8k/train", "gsm8k/test"]);
    EVAL.fail(&arguments(&["benchmark=synthetic"]), 2, &["prompt `0`", "`gsm8k/train`", "`benchmark` is synthetic"]);
    EVAL.fail(&arguments(&["split=train"]), 2, &["prompt `1`", "`gsm8k/test`", "`split` is train"]);
    fs::write(&prompts, "").unwrap();
    EVAL.fail(&arguments(&[]), 2, &["prompts.jsonl", "holds no prompts"]);
    assert!(!Path::new(&output).exists());
    for (sources, split) in [(["gsm8k/train", "gsm8k/train"], "train"), (["gsm8k/train", "gsm8k/test"], "mixed")] {
        put(&sources);
        EVAL.succeed(&arguments(&[]));
        let results = fs::read_to_string(Path::new(&output).join("results.json")).unwrap();
        let results: serde_json::Value = serde_json::from_str(&results).unwrap();
        assert_eq!((results["benchmark"].as_str(), results["split"].as_str()), (Some("gsm8k"), Some(split)));
        fs::remove_dir_all(&output).unwrap();
    }
}

#[test]
fn jsonl_has_a_scorer_and_the_row_of_a_broken_pattern_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let (teacher, prompts, output) =
        (path(dir.path(), "teacher"), path(dir.path(), "prompts.jsonl"), path(dir.path(), "output"));
    let put = |second: &str| {
        let row =
            |id: &str, reference: &str| json!({ "id": id, "prompt": "2 + 2 =", "reference": reference }).to_string();
        fs::write(&prompts, format!("{}\n{}", row("a", "."), row("b", second))).unwrap();
    };
    let run = |more: &str| {
        let given = [format!("teacher={teacher}"), format!("prompts={prompts}"), format!("output={output}")];
        let fixed = ["run", "strategies=[ar]", "max_new_tokens=5", "num_speed_examples=0", "device=cpu", more];
        [&fixed.map(str::to_owned)[..], &given].concat()
    };
    put("(");
    // There is no model yet: the pattern is checked first.
    EVAL.fail(&run("scorer=regex"), 2, &["prompts.jsonl: prompt `b`", "not a valid pattern"]);
    EVAL.fail(&run("scorer=fuzzy"), 2, &["scorer", "exact"]);
    put("^nothing$");
    model(Path::new(&teacher), 1);
    EVAL.succeed(&run("scorer=regex"));
    let mut records = read(&output);
    for answer in &mut records.answers {
        answer.finish_reason = FinishReason::Eos;
        answer.text = "so".to_owned();
    }
    records.write(&Path::new(&output).join("samples.jsonl")).unwrap();
    EVAL.succeed(&["score", &output]);
    let verdicts: Vec<Verdict> = read(&output).answers.iter().map(|answer| answer.verdict).collect();
    assert_eq!(verdicts, [Verdict::Correct, Verdict::Incorrect]);
}

#[test]
fn accuracy_on_gsm8k_stands_beside_that_of_the_official_extraction() {
    let dir = tempfile::tempdir().unwrap();
    let run = path(dir.path(), "run");
    fs::create_dir(&run).unwrap();
    let mut records = records();
    records.header.benchmark = Task::Gsm8k;
    for answer in &mut records.answers {
        answer.source = "gsm8k/test".into();
        answer.reference = Some("2 + 2 = 4\n#### 4".into());
        // The official extraction needs the mark, and no answer that was cut is correct.
        let text = ["2 + 2 = 4\n#### 4", "The answer is 4.", "#### 5", "#### 4"][answer.index];
        answer.text = text.to_owned();
        answer.finish_reason = if answer.index == 3 { FinishReason::Length } else { FinishReason::Eos };
    }
    records.write(&Path::new(&run).join("samples.jsonl")).unwrap();
    let stdout = String::from_utf8(EVAL.succeed(&["score", &run]).stdout).unwrap();
    let stdout = stdout.split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(
        stdout.contains("accuracy is by the final number; by the official extraction: teacher ar 25.0 %"),
        "{stdout}"
    );
    let results = fs::read_to_string(Path::new(&run).join("results.json")).unwrap();
    let results: serde_json::Value = serde_json::from_str(&results).unwrap();
    let figures = &results["models"][0]["strategies"][0];
    assert_eq!((&figures["metric"], &figures["correct"]), (&json!("final_number"), &json!(2)));
    let other = &figures["alternative"];
    assert_eq!((&other["metric"], &other["scored"], &other["correct"]), (&json!("strict"), &json!(4), &json!(1)));
    let verdicts: Vec<Verdict> = read(&run).answers[..4].iter().map(|a| a.alternative.unwrap().verdict).collect();
    assert_eq!(verdicts.iter().filter(|&&verdict| verdict == Verdict::Correct).count(), 1);
}

#[test]
fn accuracy_on_spider_ignores_distinct_unless_told_to_keep_it() {
    let dir = tempfile::tempdir().unwrap();
    let run = path(dir.path(), "run");
    fs::create_dir(&run).unwrap();
    let mut records = records();
    records.header.benchmark = Task::Spider;
    records.header.settings.data = Some(spider(dir.path()).into());
    for answer in &mut records.answers {
        answer.source = "spider/dev".into();
        answer.meta = Some(json!({ "db_id": "zoo" }));
        answer.reference = Some("SELECT 7 FROM pen".into());
        let text = ["SELECT DISTINCT 7 FROM pen", "```sql\nSELECT 7 FROM pen\n```", "SELECT 8", "none"][answer.index];
        answer.text = text.to_owned();
        answer.finish_reason = FinishReason::Eos;
    }
    records.write(&Path::new(&run).join("samples.jsonl")).unwrap();
    let figures = |arguments: &[&str]| {
        let stdout = EVAL.succeed(&[&["score", &run], arguments].concat()).stdout;
        let results = fs::read_to_string(Path::new(&run).join("results.json")).unwrap();
        let results: serde_json::Value = serde_json::from_str(&results).unwrap();
        (results["models"][0]["strategies"][0].clone(), String::from_utf8(stdout).unwrap())
    };
    let is_default = |(figures, stdout): (serde_json::Value, String)| {
        assert_eq!((&figures["metric"], &figures["correct"]), (&json!("ignore_distinct"), &json!(2)));
        let other = &figures["alternative"];
        assert_eq!(
            (&other["metric"], &other["correct"], &other["scored"]),
            (&json!("keep_distinct"), &1.into(), &4.into())
        );
        let stdout = stdout.split_whitespace().collect::<Vec<_>>().join(" ");
        let note = "accuracy is with DISTINCT ignored; with DISTINCT kept: teacher ar 25.0 %";
        assert!(stdout.contains(note), "{stdout}");
    };
    is_default(figures(&[]));
    // The run remembers the rule.
    for arguments in [&["--keep-distinct"][..], &[]] {
        let (figures, _) = figures(arguments);
        assert_eq!((&figures["metric"], &figures["correct"]), (&json!("keep_distinct"), &json!(1)));
        assert_eq!(figures["alternative"]["correct"], 2);
    }
    is_default(figures(&["--keep-distinct=false"]));
}

#[test]
fn a_run_that_resumes_after_score_has_one_rule_for_all_its_answers() {
    let dir = tempfile::tempdir().unwrap();
    let [teacher, prompts, output] = ["teacher", "prompts.jsonl", "output"].map(|name| path(dir.path(), name));
    model(Path::new(&teacher), 1);
    let row = |id: &str| json!({ "id": id, "source": "spider/dev", "prompt": "2 + 2 =", "reference": "SELECT 7 FROM pen", "meta": { "db_id": "zoo" } });
    fs::write(&prompts, format!("{}\n{}", row("a"), row("b"))).unwrap();
    let given = [
        format!("teacher={teacher}"),
        format!("prompts={prompts}"),
        format!("output={output}"),
        format!("data={}", spider(dir.path())),
    ];
    let fixed = ["run", "strategies=[ar]", "max_new_tokens=5", "num_speed_examples=0", "device=cpu"];
    let run = [&fixed.map(str::to_owned)[..], &given].concat();
    EVAL.succeed(&run);
    // As if it had been interrupted after the first answer, whose verdict depends on the rule.
    let mut records = read(&output);
    records.answers.truncate(1);
    records.answers[0].text = "SELECT DISTINCT 7 FROM pen".to_owned();
    records.answers[0].finish_reason = FinishReason::Eos;
    let samples = Path::new(&output).join("samples.jsonl");
    let identities = [records.header.identity.clone(), identity_with_rule(&records, &prompts)];
    for identity in identities {
        records.header.identity = identity;
        records.write(&samples).unwrap();
        EVAL.succeed(&["score", &output, "--keep-distinct"]);
        assert_eq!(read(&output).answers[0].verdict, Verdict::Incorrect);
        // What `score` changed is not what differs.
        let other = [&run[..], &["max_new_tokens=6".to_owned()]].concat();
        EVAL.fail(&other, 2, &["was started with max_new_tokens=5; this command says 6"]);
        for (rule, verdict, metric) in [
            ("keep_distinct=true", Verdict::Incorrect, "keep_distinct"),
            ("keep_distinct=false", Verdict::Correct, "ignore_distinct"),
            ("keep_distinct=true", Verdict::Incorrect, "keep_distinct"),
        ] {
            EVAL.succeed(&[&run[..], &[rule.to_owned()]].concat());
            let records = read(&output);
            assert_eq!((records.answers.len(), records.answers[0].verdict), (2, verdict), "{rule}");
            assert_eq!(records.header.settings.keep_distinct, rule == "keep_distinct=true");
            let results = fs::read_to_string(Path::new(&output).join("results.json")).unwrap();
            let results: serde_json::Value = serde_json::from_str(&results).unwrap();
            assert_eq!(results["models"][0]["strategies"][0]["metric"], metric, "{rule}");
        }
    }
}

/// The identity of a run when the settings of scoring were part of it.
fn identity_with_rule(records: &Records, prompts: &str) -> String {
    let settings = RunSettings { output: PathBuf::new(), ..records.header.settings.clone() };
    let samples = prompt_set::read(Path::new(prompts)).unwrap();
    fingerprint::hash_bytes(&serde_json::to_vec(&(settings, &records.header.models, samples)).unwrap())
}

#[test]
fn a_command_that_would_take_verdicts_away_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let [teacher, output] = ["teacher", "output"].map(|name| path(dir.path(), name));
    model(Path::new(&teacher), 1);
    let given = [format!("teacher={teacher}"), format!("output={output}")];
    let fixed = ["run", "num_problems=2", "max_new_tokens=4", "num_speed_examples=2", "device=cpu"];
    let run = [&fixed.map(str::to_owned)[..], &given, &["concurrency=[2]".to_owned()]].concat();
    EVAL.succeed(&run[..run.len() - 1]);
    let samples = Path::new(&output).join("samples.jsonl");
    for scored_with in ["execute_code=true", "data=spider"] {
        // As `score` leaves it.
        let mut scored = read(&output);
        scored.header.settings.execute_code = scored_with == "execute_code=true";
        scored.header.settings.data = (scored_with == "data=spider").then(|| "spider".into());
        scored.write(&samples).unwrap();
        let refusal = format!("samples.jsonl: its answers were scored with {scored_with}");
        EVAL.fail(&run, 2, &[&refusal, &format!("add `{scored_with}`, or choose another `output`")]);
        assert_eq!(read(&output), scored, "nothing is lost");
    }
    EVAL.succeed(&[&run[..], &["data=spider".to_owned()]].concat());
    assert!(!read(&output).throughputs.is_empty());
}

#[test]
fn the_rule_of_spider_is_refused_for_other_benchmarks() {
    let dir = tempfile::tempdir().unwrap();
    let run = path(dir.path(), "run");
    fs::create_dir(&run).unwrap();
    let samples = Path::new(&run).join("samples.jsonl");
    records().write(&samples).unwrap();
    let before = fs::read(&samples).unwrap();
    for option in ["--keep-distinct", "--keep-distinct=false"] {
        EVAL.fail(&["score", &run, option], 2, &["`--keep-distinct` is for spider only, not for jsonl"]);
    }
    assert_eq!(fs::read(&samples).unwrap(), before);
    let teacher = path(dir.path(), "teacher");
    model(Path::new(&teacher), 1);
    let given = [format!("teacher={teacher}"), format!("output={run}-2")];
    let words = ["run", "benchmark=synthetic", "keep_distinct=true", "device=cpu", &given[0], &given[1]];
    EVAL.fail(&words, 2, &["`keep_distinct` is for spider only, not for synthetic"]);
}

#[test]
fn accuracy_on_spider_is_broken_down_by_difficulty() {
    let mut records = records();
    records.header.benchmark = Task::Spider;
    for answer in &mut records.answers {
        let query = if answer.index < 3 { "SELECT a FROM t" } else { "SELECT a FROM t WHERE b IN (SELECT b FROM u)" };
        answer.reference = Some(query.to_owned());
    }
    let results = serde_json::to_value(cllm_eval::results::Results::from_records(&records)).unwrap();
    let classes = &results["models"][1]["strategies"][1]["by_difficulty"];
    assert_eq!((&classes["easy"]["correct"], &classes["easy"]["scored"]), (&1.into(), &3.into()));
    assert_eq!((&classes["hard"]["accuracy"], classes.as_object().unwrap().len()), (&1.0.into(), 2));
}

#[test]
fn codesearchnet_is_compared_with_its_references() {
    let mut records = records();
    records.header.benchmark = Task::Codesearchnet;
    for answer in &mut records.answers {
        (answer.text, answer.reference) = ("a b c d e".to_owned(), Some("a b c d e".to_owned()));
        answer.verdict = Verdict::Unscored;
    }
    let results = cllm_eval::results::Results::from_records(&records);
    let document = serde_json::to_value(&results).unwrap();
    let similarity = &document["models"][1]["strategies"][0]["similarity"];
    assert_eq!(similarity, &json!({ "bleu": 1.0, "exact_prefix": 1.0 }));
    assert!(cllm_eval::terminal::summary(&results).contains("BLEU 100.0"));
}
