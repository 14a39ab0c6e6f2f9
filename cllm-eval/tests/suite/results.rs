//! `results.json` on made-up records.

use cllm_core::decode::Strategy;
use cllm_core::thought::Thought;
use cllm_eval::acceptance::{Acceptance, Segment};
use cllm_eval::records::AnswerRecord;
use cllm_eval::results::Results;
use cllm_eval::role::Role;
use serde_json::Value;

use crate::made_up::{JACOBI, records};

fn value() -> Value {
    serde_json::to_value(Results::from_records(&records())).unwrap()
}

#[test]
fn the_file_has_the_documented_fields() {
    let value = value();
    for key in ["schema_version", "benchmark", "split", "examples", "hardware", "toolkit", "models", "settings"] {
        assert!(!value[key].is_null(), "{key}");
    }
    let model = &value["models"][1];
    assert_eq!((model["role"].as_str(), model["path"].as_str()), (Some("student"), Some("s")));
    let strategy = &model["strategies"][1];
    for key in "name accuracy ci95 unfinished tokens forwards tokens_per_forward tokens_per_forward_finished \
        prefill_seconds seconds tokens_per_second speedup_vs_teacher_ar speedup_vs_student_ar exact_match_vs_ar"
        .split_whitespace()
    {
        assert!(!strategy[key].is_null(), "{key}");
    }
    assert!(strategy.as_object().unwrap().contains_key("peak_memory_bytes"));
}

#[test]
fn the_data_format_page_names_every_field() {
    let page = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/data-format.md")).unwrap();
    let records = records();
    let answer = records.answers.iter().find(|answer| answer.logit_gap_at_difference.is_some()).unwrap();
    let value = value();
    for documented in [
        &value,
        &value["hardware"],
        &value["toolkit"],
        &value["models"][0],
        &value["models"][0]["strategies"][0],
        &value["models"][0]["strategies"][0]["concurrency"][0],
        &value["paired"][0],
        &serde_json::to_value(&records.header).unwrap(),
        &serde_json::to_value(answer).unwrap(),
        &serde_json::to_value(&records.speeds[0]).unwrap(),
        &serde_json::to_value(&records.throughputs[0]).unwrap(),
        &serde_json::to_value(cllm_eval::doctor::examine()).unwrap(),
    ] {
        for key in documented.as_object().unwrap().keys() {
            assert!(page.contains(&format!("`{key}`")), "{key} is missing in docs/data-format.md");
        }
    }
}

#[test]
fn every_committed_results_file_can_be_read() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/results");
    let levers = format!("{folder}/spider-levers");
    let entries = [folder, &levers].into_iter().flat_map(|folder| std::fs::read_dir(folder).unwrap());
    let files = entries
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "json"));
    let mut num_read = 0;
    for file in files {
        // The folder also has the files of `bench`.
        if std::fs::read_to_string(&file).unwrap().contains("\"benchmark\"") {
            Results::read(&file).unwrap();
            num_read += 1;
        }
    }
    assert!(num_read > 0);
}

#[test]
fn figures_follow_from_the_records() {
    let value = value();
    let teacher = &value["models"][0]["strategies"][0];
    assert_eq!(teacher["accuracy"], 0.75);
    assert_eq!(teacher["unfinished"], 1);
    assert_eq!(teacher["tokens_per_forward"], 1.0);
    assert_eq!(teacher["speedup_vs_teacher_ar"], 1.0);
    let student = &value["models"][1]["strategies"][1];
    assert_eq!(student["name"], "jacobi");
    assert_eq!(student["max_tokens_per_forward"], 4);
    assert_eq!(student["tokens"], 32);
    assert_eq!(student["forwards"], 8);
    assert_eq!(student["tokens_per_forward"], 4.0);
    assert_eq!(student["exact_match_vs_ar"], 0.75);
    assert_eq!(
        (&student["median_logit_gap_at_difference"], &student["max_logit_gap_at_difference"]),
        (&0.25.into(), &0.25.into())
    );
    assert!(teacher["max_logit_gap_at_difference"].is_null());
    // 16 tokens in 4 s against 16 in 16 s; including prefill, 6 s against 18 s.
    assert_eq!(student["tokens_per_second"], 4.0);
    assert_eq!(student["speedup_vs_teacher_ar"], 4.0);
    assert_eq!(student["speedup_vs_student_ar"], 4.0);
    assert!((student["end_to_end_speedup_vs_teacher_ar"].as_f64().unwrap() - 3.0).abs() < 1e-12);
    let paired = &value["paired"][1];
    assert_eq!((&paired["student_only"], &paired["teacher_only"]), (&1.into(), &2.into()));
    assert_eq!(paired["difference"], -0.25);
    // The student keeps one of the teacher's three correct answers.
    assert!((paired["correct_kept_fraction"].as_f64().unwrap() - 1.0 / 3.0).abs() < 1e-12);
    assert!((value["paired"][0]["correct_kept_fraction"].as_f64().unwrap() - 2.0 / 3.0).abs() < 1e-12);
}

#[test]
fn memory_is_compared_with_that_of_the_same_models_autoregressive_decoding() {
    let mut records = records();
    let memory = |role: Role, strategy: Strategy| match (role, strategy) {
        (Role::Teacher, _) => 1000,
        (Role::Student, Strategy::Ar) => 400,
        (Role::Student, _) => 500,
    };
    for answer in &mut records.answers {
        answer.peak_memory_bytes = Some(2 * memory(answer.role, answer.strategy));
    }
    for speed in &mut records.speeds {
        // The largest peak of the examples counts.
        speed.peak_memory_bytes = Some(memory(speed.role, speed.strategy) - speed.index as u64);
    }
    let results = Results::from_records(&records);
    let [ar, jacobi] = &results.models[1].strategies[..] else { panic!("two strategies") };
    assert_eq!((ar.speed_peak_memory_bytes, jacobi.speed_peak_memory_bytes), (Some(400), Some(500)));
    assert_eq!((ar.speed_peak_memory_over_ar, jacobi.speed_peak_memory_over_ar), (Some(1.0), Some(1.25)));
    assert_eq!((ar.peak_memory_over_ar, jacobi.peak_memory_over_ar), (Some(1.0), Some(1.25)));
    assert_eq!(jacobi.peak_memory_bytes, Some(1000));
}

#[test]
fn figures_of_several_rows_are_those_of_the_median_repetition() {
    let value = value();
    let [one, two] = &value["models"][1]["strategies"][1]["concurrency"].as_array().unwrap()[..] else {
        panic!("one row and two rows")
    };
    assert_eq!((&one["concurrency"], &two["concurrency"]), (&1.into(), &2.into()));
    assert_eq!((&one["tokens_per_second"], &one["speedup_vs_teacher_ar"]), (&4.0.into(), &4.0.into()));
    // 128 tokens in 4 s against 10 s of autoregressive decoding; with prefill, in 6 s against 12 s.
    for (key, expected) in [
        ("repetitions", 3.0),
        ("seconds", 4.0),
        ("tokens_per_second", 32.0),
        ("tokens_per_second_per_user", 32.0 / 1.75),
        ("mean_rows", 1.75),
        ("speedup_vs_teacher_ar", 2.5),
        ("speedup_vs_student_ar", 2.5),
        ("end_to_end_seconds", 6.0),
        ("end_to_end_speedup_vs_teacher_ar", 2.0),
    ] {
        assert!((two[key].as_f64().unwrap() - expected).abs() < 1e-9, "{key}: {two}");
    }
    let teacher = &value["models"][0]["strategies"][0]["concurrency"][1];
    assert_eq!(teacher["speedup_vs_teacher_ar"], 1.0);
}

#[test]
fn without_timings_speeds_are_null() {
    let mut records = records();
    records.speeds.clear();
    let value = serde_json::to_value(Results::from_records(&records)).unwrap();
    let strategy = &value["models"][1]["strategies"][1];
    for key in ["prefill_seconds", "seconds", "tokens_per_second", "speedup_vs_teacher_ar", "speedup_vs_student_ar"] {
        assert!(strategy[key].is_null(), "{key}");
    }
    assert_eq!(strategy["tokens_per_forward"], 4.0);
}

#[test]
fn acceptance_counts_every_forward() {
    let results = Results::from_records(&records());
    assert_eq!(results.models[0].strategies[0].acceptance, None);
    // Four answers of 8 tokens, each in 2 forwards of 4.
    let acceptance = results.models[1].strategies[1].acceptance.clone().unwrap();
    assert_eq!(acceptance.forwards, [0, 0, 0, 8]);
    assert_eq!(acceptance.by_position, [1.0, 1.0, 1.0]);
    assert_eq!(acceptance.over_answer, [Segment { start: 0, tokens: 32, forwards: 8 }]);
}

#[test]
fn forwards_after_a_closed_thought_begin_behind_the_tokens_that_closed_it() {
    let mut records = records();
    let answer = records.answers_of(Role::Student, JACOBI).next().unwrap().clone();
    records.answers = vec![AnswerRecord {
        // Three forwards of 10 tokens, 5 tokens that nothing decoded, and two forwards more.
        response_ids: (0..55).collect(),
        thought: Some(Thought::Forced(30..35)),
        accepted: vec![10; 5],
        forwards: 5,
        ..answer
    }];
    let acceptance = Acceptance::from_answers(&records.answers.iter().collect::<Vec<_>>());
    let first = Segment { start: 0, tokens: 30, forwards: 3 };
    assert_eq!(acceptance.over_answer, [first, Segment { start: 32, tokens: 20, forwards: 2 }]);
    assert_eq!(acceptance.forwards.last(), Some(&5));
}

#[test]
fn a_temperature_that_chooses_the_likeliest_token_is_called_greedy() {
    let mut results = Results::from_records(&records());
    for (temperature, name) in [(0.0, "greedy"), (1e-9, "greedy"), (0.5, "sampled at temperature 0.5")] {
        results.settings.temperature = temperature;
        assert_eq!(results.sampling(), name);
    }
}
