//! `run` as a user starts it: resuming, drafted strategies, temperatures, adapters.

use std::path::Path;

use cllm_core::checkpoint;
use cllm_core::decode::Strategy;
use cllm_core::model::LoraConfig;
use cllm_eval::records::Records;
use cllm_eval::results::Results;
use cllm_eval::role::Role;
use cllm_eval::table::notes;
use serde_json::{Value, json};
use tch::{Device, Kind};

use crate::made_up::{draft_adapters, eloquent_model, model, program, thinking_model};

fn run(folder: &Path) -> Value {
    run_with(folder, &[])
}

fn run_with(folder: &Path, more: &[&str]) -> Value {
    let output = program()
        .current_dir(folder)
        .args(["run", "--quiet", "--json", "teacher=teacher", "student=student", "num_problems=6", "max_new_tokens=12"])
        .args(["num_speed_examples=2", "batch_size=4", "strategies=[ar, {jacobi: {n: 4}}]", "device=cpu", "output=out"])
        .args(more)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn a_killed_run_resumes_and_score_gives_the_same_figures() {
    let dir = tempfile::tempdir().unwrap();
    model(&dir.path().join("teacher"), 1);
    model(&dir.path().join("student"), 2);
    let first = run(dir.path());
    let strategy = &first["models"][1]["strategies"][1];
    assert_eq!((&strategy["examples"], &strategy["speed_examples"]), (&6.into(), &2.into()));
    assert_eq!(strategy["exact_match_vs_ar"], 1.0);
    let samples = dir.path().join("out/samples.jsonl");
    let text = std::fs::read_to_string(&samples).unwrap();
    assert_eq!(text.lines().count(), 1 + 4 * 6 + 4 * 2);

    // A kill in the middle of line 12: the whole lines before it are kept, byte for byte.
    let lines: Vec<&str> = text.lines().collect();
    let cut = format!("{}\n{}", lines[..11].join("\n"), &lines[11][..20]);
    std::fs::write(&samples, cut).unwrap();
    // The chat template prints no date, so the date is no part of the run.
    let second = run_with(dir.path(), &["date=2020-01-01"]);
    let again = std::fs::read_to_string(&samples).unwrap();
    assert_eq!(again.lines().take(11).collect::<Vec<_>>(), lines[..11]);
    assert_eq!(again.lines().count(), lines.len());
    assert_eq!(second["models"][1]["strategies"][1]["tokens"], strategy["tokens"]);

    let output = program().current_dir(dir.path()).args(["score", "out", "--json"]).output().unwrap();
    assert_eq!(serde_json::from_slice::<Value>(&output.stdout).unwrap(), second);

    let records = Records::read(&samples).unwrap();
    let shown: Vec<_> = records.answers.iter().filter(|answer| answer.forward_texts.is_some()).collect();
    assert_eq!(shown.len(), 4 * 5);
    for answer in shown {
        assert_eq!(answer.forward_texts.as_ref().unwrap().concat(), answer.text);
    }
    assert!(program().current_dir(dir.path()).args(["report", "out"]).output().unwrap().status.success());
    assert!(dir.path().join("out/report.html").exists());

    // An answer that differs from the autoregressive one gets the logit gap at its first
    // difference.
    let changed = |line: &str| {
        let mut record: Value = serde_json::from_str(line).unwrap();
        let is_changed = record["role"] == "student" && record["index"] == 0 && record["strategy"] != "ar";
        if is_changed && record["response_ids"].is_array() {
            record["response_ids"][2] = (record["response_ids"][2].as_i64().unwrap() ^ 1).into();
            record.as_object_mut().unwrap().remove("checksum").unwrap();
        }
        record.to_string()
    };
    let text = std::fs::read_to_string(&samples).unwrap();
    std::fs::write(&samples, text.lines().map(changed).collect::<Vec<_>>().join("\n") + "\n").unwrap();
    std::fs::remove_file(dir.path().join("out/results.json")).unwrap();
    let third = run(dir.path());
    let max_gap = |strategy: usize| third["models"][1]["strategies"][strategy]["max_logit_gap_at_difference"].as_f64();
    assert!(max_gap(1).is_some_and(|gap| gap > 0.0) && max_gap(0).is_none(), "{third}");

    // Answers with other settings are never mixed into the same folder.
    let arguments = ["run", "teacher=teacher", "num_problems=5", "device=cpu", "output=out"];
    let output = program().current_dir(dir.path()).args(arguments).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("was started with student="));
}

#[test]
fn a_student_as_draft_model_leaves_the_answers_of_its_teacher_unchanged() {
    let dir = tempfile::tempdir().unwrap();
    eloquent_model(&dir.path().join("teacher"), 1);
    eloquent_model(&dir.path().join("student"), 2);
    let run = |models: &[&str]| {
        program()
            .current_dir(dir.path())
            .args(["run", "--quiet", "--json", "num_problems=5", "max_new_tokens=12", "batch_size=3", "device=cpu"])
            .args(["strategies=[{drafted: {n: 6}}, ar]", "num_speed_examples=2", "output=out"])
            .args(models)
            .output()
            .unwrap()
    };
    let alone = run(&["teacher=teacher"]);
    assert_eq!(alone.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&alone.stderr).contains("set `teacher` and `student`"));
    let both = run(&["teacher=teacher", "student=student"]);
    assert!(both.status.success(), "{}", String::from_utf8_lossy(&both.stderr));
    let results: Value = serde_json::from_slice(&both.stdout).unwrap();
    let strategies = |model: usize| results["models"][model]["strategies"].as_array().unwrap();
    let labels =
        |model| strategies(model).iter().map(|strategy| strategy["label"].as_str().unwrap()).collect::<Vec<_>>();
    assert_eq!((labels(0), labels(1)), (vec!["drafted n=6", "ar"], vec!["ar"]));
    let drafted = &strategies(0)[0];
    assert_eq!((&drafted["exact_match_vs_ar"], &drafted["speed_examples"]), (&1.0.into(), &2.into()));
    let records = Records::read(&dir.path().join("out/samples.jsonl")).unwrap();
    assert_eq!((records.answers.len(), records.speeds.len()), (15, 6));
    let own = |role: Role| records.answers.iter().find(|answer| answer.role == role && answer.strategy == Strategy::Ar);
    assert_ne!(own(Role::Teacher).unwrap().response_ids, own(Role::Student).unwrap().response_ids);
}

#[test]
fn every_strategy_samples_the_same_answers_at_a_temperature() {
    let dir = tempfile::tempdir().unwrap();
    model(&dir.path().join("student"), 2);
    let run = |temperature: &str| {
        let output = program()
            .current_dir(dir.path())
            .args(["run", "--quiet", "--json", "student=student", "num_problems=6", "max_new_tokens=12", "device=cpu"])
            .args(["strategies=[ar, {rolling: {n: 8}}, {lookahead: {}}]", "num_speed_examples=2"])
            .args([format!("temperature={temperature}"), format!("output=at-{temperature}")])
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let samples = dir.path().join(format!("at-{temperature}/samples.jsonl"));
        let results: Value = serde_json::from_slice(&output.stdout).unwrap();
        (results, Records::read(&samples).unwrap())
    };
    let ids = |records: &Records| -> Vec<Vec<i32>> {
        records.answers.iter().map(|answer| answer.response_ids.clone()).collect()
    };
    let (greedy, greedy_records) = run("0");
    let (sampled, sampled_records) = run("1.5");
    assert_eq!((&greedy["settings"]["temperature"], &sampled["settings"]["temperature"]), (&0.0.into(), &1.5.into()));
    assert_ne!(ids(&greedy_records), ids(&sampled_records));
    for strategy in sampled["models"][0]["strategies"].as_array().unwrap() {
        assert_eq!(strategy["exact_match_vs_ar"], 1.0, "{strategy}");
    }
    // Timed answers are sampled too: each needs as many forwards as in its batch.
    assert_eq!(sampled_records.speeds.len(), 3 * 2);
    for speed in &sampled_records.speeds {
        let same = sampled_records
            .answers
            .iter()
            .find(|one| (one.strategy, one.index) == (speed.strategy, speed.index))
            .unwrap();
        assert_eq!((speed.forwards, speed.tokens), (same.forwards, same.response_ids.len()));
    }
}

#[test]
fn a_thought_is_closed_at_its_limit_by_every_strategy_and_counted() {
    let dir = tempfile::tempdir().unwrap();
    thinking_model(&dir.path().join("teacher"), 1);
    thinking_model(&dir.path().join("student"), 2);
    let prompt = |index: usize| {
        let opening = if index < 6 { "<think>\n" } else { "" };
        json!({ "id": format!("p{index}"), "prompt": format!("{index} apples{opening}"), "reference": "7" }).to_string()
    };
    let prompts = (0..8).map(prompt).collect::<Vec<_>>().join("\n");
    std::fs::write(dir.path().join("prompts.jsonl"), prompts + "\nnot JSON").unwrap();
    let run = |more: &[&str]| {
        program()
            .current_dir(dir.path())
            .args(["run", "--quiet", "--json", "teacher=teacher", "student=student", "prompts=prompts.jsonl"])
            .args(["strategies=[ar, {jacobi: {n: 4}}, {rolling: {n: 5}}, {lookahead: {}}, {drafted: {n: 4}}]"])
            .args(["max_new_tokens=30", "batch_size=3", "num_speed_examples=2", "device=cpu", "output=out"])
            .args(more)
            .output()
            .unwrap()
    };
    for more in [&["max_thinking_tokens=10"][..], &["max_thinking_tokens=10", "temperature=0.9", "output=sampled"]] {
        let output = run(more);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let results: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(results["settings"]["max_thinking_tokens"], 10);
        assert_eq!((&results["examples"], &results["set_aside"]), (&8.into(), &1.into()));
        let samples = dir.path().join(if more.len() == 1 { "out" } else { "sampled" }).join("samples.jsonl");
        let records = Records::read(&samples).unwrap();
        assert!(records.answers.iter().filter(|answer| !answer.forced_tokens().is_empty()).count() > 18);
        for answer in &records.answers {
            assert!(answer.forced_tokens().is_empty() || answer.forced_tokens().start == 10, "{answer:?}");
            assert_eq!(answer.accepted.iter().sum::<u32>() as usize, answer.num_decoded_tokens());
            if let Some(texts) = &answer.forward_texts {
                assert_eq!(texts.concat(), answer.text);
            }
        }
        for speed in &records.speeds {
            let mut answers = records.answers_of(speed.role, speed.strategy);
            let same = answers.find(|answer| answer.index == speed.index).unwrap();
            assert_eq!((speed.tokens, speed.forwards), (same.num_decoded_tokens(), same.forwards));
        }
        for (role, figures) in Results::from_records(&records).strategies() {
            let answers: Vec<_> = records.answers_of(role, figures.strategy).collect();
            let closed = answers.iter().filter(|answer| !answer.forced_tokens().is_empty()).count();
            assert_eq!(figures.exact_match_vs_ar, Some(1.0), "{}", figures.label);
            assert_eq!(figures.closed_thoughts, Some(closed));
            assert!(figures.thoughts >= Some(6) && figures.closed_thoughts <= figures.thoughts);
            assert_eq!(figures.tokens, answers.iter().map(|answer| answer.num_decoded_tokens()).sum::<usize>());
            let line = format!("{closed} of {} thoughts closed at the limit", figures.thoughts.unwrap());
            assert!(notes(&Results::from_records(&records)).iter().any(|note| note.contains(&line)), "{line}");
        }
        assert!(notes(&Results::from_records(&records))[0].starts_with("1 row of the prompt set set aside"));
    }
    let refused = |more: &[&str], part: &str| {
        let output = run(more);
        let message = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.code() == Some(2) && message.contains(part), "{message}");
    };
    refused(&["max_thinking_tokens=12"], "was started with max_thinking_tokens=10; this command says 12");
    refused(&["max_thinking_tokens=28"], "do not fit into max_new_tokens=30");
    model(&dir.path().join("student"), 2);
    refused(&["max_thinking_tokens=10"], "max_thinking_tokens: the model's tokenizer has no tokens <think>");
}

#[test]
fn an_adapter_is_evaluated_by_its_folder() {
    let dir = tempfile::tempdir().unwrap();
    let (base, adapter, merged) = (dir.path().join("base"), dir.path().join("adapter"), dir.path().join("merged"));
    [&base, &merged].into_iter().for_each(|folder| model(folder, 3));
    std::fs::create_dir(&adapter).unwrap();
    let mut adapted = checkpoint::load(&base, Device::Cpu, Kind::Float).unwrap();
    adapted.add_adapters(&LoraConfig::default(), 1);
    for (_, mut tensor) in adapted.trainable().tensors() {
        let _ = tch::no_grad(|| tensor.fill_(0.1));
    }
    checkpoint::save_adapter(&adapted, &adapter, &base.display().to_string()).unwrap();
    checkpoint::save(&adapted, &merged, Kind::Float).unwrap();
    let fixed = ["generate", "What is 2 and 2?", "--max-new-tokens", "20", "--device", "cpu", "--json", "--model"];
    let [base, adapter, merged] = [&base, &adapter, &merged].map(|folder| {
        let output = program().args(fixed).arg(folder).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let value: Value = serde_json::from_slice(&output.stdout).unwrap();
        value["strategies"][0]["response_ids"].clone()
    });
    assert_eq!(adapter, merged);
    assert_ne!(adapter, base);
    let measured = program()
        .current_dir(dir.path())
        .args(["run", "--quiet", "--json", "teacher=base", "student=adapter", "num_problems=2", "max_new_tokens=6"])
        .args(["num_speed_examples=1", "strategies=[ar]", "device=cpu", "output=out"])
        .output()
        .unwrap();
    assert!(measured.status.success(), "{}", String::from_utf8_lossy(&measured.stderr));
    let results: Value = serde_json::from_slice(&measured.stdout).unwrap();
    assert_eq!(results["models"][1]["path"], "adapter");
    assert_ne!(results["models"][0]["fingerprint"], results["models"][1]["fingerprint"]);
}

#[test]
fn adapters_for_drafts_are_evaluated_as_a_student_with_the_answers_of_its_teacher() {
    let dir = tempfile::tempdir().unwrap();
    let (base, adapter) = (dir.path().join("base"), dir.path().join("adapter"));
    model(&base, 3);
    draft_adapters(&adapter, &base);
    let run = |models: &[&str]| {
        let fixed = ["run", "--json", "num_problems=2", "max_new_tokens=6", "num_speed_examples=1"];
        let others = ["strategies=[ar, {gated: {n: 4}}]", "device=cpu", "output=out"];
        program().current_dir(dir.path()).args(fixed).args(others).args(models).output().unwrap()
    };
    let refused = run(&["teacher=base"]);
    let message = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(refused.status.code() == Some(2) && message.contains("set `student`"), "{message}");
    let measured = run(&["teacher=base", "student=adapter"]);
    assert!(measured.status.success(), "{}", String::from_utf8_lossy(&measured.stderr));
    let results: Value = serde_json::from_slice(&measured.stdout).unwrap();
    let strategies = |model: usize| results["models"][model]["strategies"].as_array().unwrap();
    let names = |model| strategies(model).iter().map(|strategy| strategy["name"].as_str().unwrap()).collect::<Vec<_>>();
    // Without drafts, the student would be the teacher once more.
    assert_eq!((names(0), names(1)), (vec!["ar"], vec!["gated"]));
    assert_eq!(
        (&results["models"][1]["adapts_teacher"], &strategies(1)[0]["exact_match_vs_ar"]),
        (&true.into(), &1.0.into())
    );
    assert!(strategies(1)[0]["speedup_vs_teacher_ar"].as_f64().is_some_and(|speedup| speedup > 0.0), "{results}");
    assert_eq!(strategies(1)[0]["max_tokens_per_forward"], 4);
    // Adapters of another model than the teacher: what that decodes without them is measured too.
    model(&dir.path().join("other"), 4);
    let beside = run(&["teacher=other", "student=adapter", "output=beside"]);
    let beside: Value = serde_json::from_slice(&beside.stdout).unwrap();
    assert_eq!(beside["models"][1]["strategies"].as_array().map(Vec::len), Some(2));
    assert_eq!(beside["models"][1].get("adapts_teacher"), None);
    for (output, strategies, note) in [
        (
            "output=rolling",
            "[ar, {rolling: {n: 4}}]",
            "no strategy uses its adapters for draft tokens; set strategies=",
        ),
        ("output=drafted", "[ar, {gated: {n: 4}}, {drafted: {n: 4}}]", "`drafted n=4` does not use its adapters for"),
    ] {
        let noted = run(&["teacher=base", "student=adapter", output, &format!("strategies={strategies}")]);
        let said = String::from_utf8_lossy(&noted.stderr).into_owned();
        assert!(noted.status.success() && said.contains(note), "{said}");
    }
    let run_verb = |arguments: &[&str]| {
        let output = program().current_dir(dir.path()).args(arguments).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        output.stdout
    };
    run_verb(&["report", "out"]);
    let card = std::fs::read_to_string(dir.path().join("out/model-card.md")).unwrap();
    assert!(card.contains("Do not merge them") && !card.contains("custom_generate"), "{card}");
    let generate = ["generate", "--json", "--model", "adapter", "--n", "4", "--max-new-tokens", "6", "one plus two"];
    let generation: Value = serde_json::from_slice(&run_verb(&generate)).unwrap();
    let gated = &generation["strategies"][1];
    assert_eq!((&gated["name"], &generation["equal"]), (&"gated".into(), &true.into()));
    assert_eq!(gated["max_tokens_per_forward"], 4);
}

#[test]
fn bad_settings_exit_with_code_2_and_missing_devices_with_code_3() {
    let exit = |arguments: &[&str]| {
        let output = program().args(arguments).output().unwrap();
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let (code, message) = exit(&["run", "studnet=x"]);
    assert_eq!(code, Some(2));
    assert!(message.contains("did you mean `student`"), "{message}");
    let (code, message) = exit(&["run", "strategies=[{jacobi: {n: 1}}]"]);
    assert_eq!(code, Some(2));
    assert!(message.contains("strategy `jacobi`: n=1"), "{message}");
    for temperature in ["11", "-0.5", ".nan", "warm"] {
        let (code, message) = exit(&["run", "student=x", &format!("temperature={temperature}")]);
        assert!(code == Some(2) && message.contains("temperature"), "{temperature}: {message}");
    }
    let (code, message) = exit(&["run", "student=x", "device=cuda:4096"]);
    assert_eq!(code, Some(3));
    assert!(message.contains("cuda:4096"), "{message}");
    assert_eq!(exit(&["run"]).0, Some(2));
}
