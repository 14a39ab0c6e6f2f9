//! MT-bench: second turns contain the first answers of the same model and strategy, runs resume,
//! and FastChat's files are written.

use std::fs;
use std::path::Path;

use cllm_core::decode::Strategy;
use cllm_core::tokenizer::Tokenizer;
use cllm_eval::mt_bench_turns;
use cllm_eval::records::{AnswerRecord, Records};
use cllm_eval::role::Role;
use serde_json::{Value, json};

use crate::made_up::{JACOBI, draft_adapters, eloquent_model, model};
use cllm_testing::programs::{Program, path};

const EVAL: Program = Program("cllm-eval");
const QUESTIONS: usize = 3;

fn questions(data: &str) {
    fs::create_dir_all(data).unwrap();
    let row = |number: usize| {
        let turns = [format!("Tom has {number} apples. How many?"), "And two more?".to_owned()];
        json!({ "question_id": 81 + number, "category": "math", "turns": turns }).to_string() + "\n"
    };
    fs::write(Path::new(data).join("question.jsonl"), (0..QUESTIONS).map(row).collect::<String>()).unwrap();
}

/// The arguments of an evaluation whose answers have various lengths: these distinguish the prompts in
/// the timings, which keep only the length.
fn evaluation(strategies: &str, [teacher, student, data, output]: [&str; 4]) -> Vec<String> {
    let fixed = ["run", "benchmark=mt-bench", "max_new_tokens=24", "batch_size=2", "num_speed_examples=6"];
    let eos_ids = format!("{:?}", (20..50).collect::<Vec<_>>());
    let given = [
        ("strategies", strategies),
        ("teacher", teacher),
        ("student", student),
        ("data", data),
        ("output", output),
        ("eos_ids", &eos_ids),
    ];
    let more = given.map(|(key, value)| format!("{key}={value}"));
    fixed.into_iter().chain(["device=cpu", "--json"]).map(str::to_owned).chain(more).collect()
}

fn read(output: &str) -> Records {
    Records::read(&Path::new(output).join("samples.jsonl")).unwrap()
}

fn find(records: &Records, role: Role, strategy: Strategy, index: usize) -> &AnswerRecord {
    let matches = |answer: &&AnswerRecord| (answer.role, answer.strategy, answer.index) == (role, strategy, index);
    records.answers.iter().find(matches).unwrap()
}

/// Checks that the prompt of every second turn contains its own first answer.
fn expect_own_first_answers(records: &Records, folders: [&str; 2]) {
    for (role, folder) in [Role::Teacher, Role::Student].into_iter().zip(folders) {
        let tokenizer = Tokenizer::load(Path::new(folder)).unwrap();
        for strategy in [Strategy::Ar, JACOBI] {
            for index in (0..2 * QUESTIONS).step_by(2) {
                let [first, second] = [index, index + 1].map(|index| find(records, role, strategy, index));
                let question = 81 + index / 2;
                assert_eq!([&first.id, &second.id], [&format!("{question}/1"), &format!("{question}/2")]);
                assert!(first.prompt.contains("apples") && !first.prompt.contains("two more"), "{}", first.prompt);
                let conversation = mt_bench_turns::conversation(&second.sample(), &first.text).unwrap();
                assert_eq!(second.prompt, tokenizer.encode_prompt(&conversation).unwrap().0);
                assert!(!first.text.is_empty() && second.prompt.contains("two more"), "{first:?} {}", second.prompt);
            }
        }
    }
}

fn expect_fastchat(output: &str, records: &Records) {
    let folder = Path::new(output).join("model_answer");
    assert_eq!(fs::read_dir(&folder).unwrap().count(), 4);
    let mut ids = std::collections::HashSet::new();
    for (name, role, strategy) in [
        ("teacher-ar", Role::Teacher, Strategy::Ar),
        ("teacher-jacobi-n=4", Role::Teacher, JACOBI),
        ("student-ar", Role::Student, Strategy::Ar),
        ("student-jacobi-n=4", Role::Student, JACOBI),
    ] {
        let text = fs::read_to_string(folder.join(format!("{name}.jsonl"))).unwrap();
        let rows: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(rows.len(), QUESTIONS);
        for (number, row) in rows.iter().enumerate() {
            assert_eq!((&row["question_id"], &row["model_id"]), (&json!(81 + number), &json!(name)));
            let turns = [0, 1].map(|turn| find(records, role, strategy, 2 * number + turn).text.clone());
            assert_eq!(row["choices"], json!([{ "index": 0, "turns": turns }]));
            assert!(row["tstamp"].as_f64().unwrap() > 1.7e9);
            assert!(ids.insert(row["answer_id"].as_str().unwrap().to_owned()), "{row}");
        }
    }
}

/// A student that is its teacher with adapters has no autoregressive answers of its own.
#[test]
fn second_turns_of_adapters_for_drafts_follow_the_answers_of_the_teacher() {
    let dir = tempfile::tempdir().unwrap();
    let [teacher, student, data, output] = ["teacher", "student", "data", "output"].map(|name| path(dir.path(), name));
    eloquent_model(Path::new(&teacher), 1);
    draft_adapters(Path::new(&student), Path::new(&teacher));
    questions(&data);
    let words = evaluation("[ar, {gated: {n: 4}}]", [&teacher, &student, &data, &output]);
    EVAL.succeed(&words);
    let mut left = read(&output);
    // Of a run that was interrupted before the first timing, no answer is left to make.
    left.speeds.clear();
    let samples = Path::new(&output).join("samples.jsonl");
    left.write(&samples).unwrap();
    EVAL.succeed(&words);
    let whole = read(&output);
    let gated: Vec<_> = whole.speeds.iter().filter(|speed| speed.role == Role::Student).collect();
    assert_eq!((gated.len(), whole.speeds.len()), (6, 2 * 6));
    for speed in gated {
        let of_teacher = find(&whole, Role::Teacher, Strategy::Ar, speed.index);
        assert_eq!(speed.tokens, of_teacher.response_ids.len(), "timed at another prompt: {}", speed.index);
    }

    // A run that an earlier version began, which did not know of such students, goes on as it began.
    left.header.models[1].adapts_teacher = false;
    left.write(&samples).unwrap();
    let results: Value = serde_json::from_slice(&EVAL.succeed(&words).stdout).unwrap();
    assert_eq!(results["models"][1]["strategies"].as_array().map(Vec::len), Some(2));
}

#[test]
fn second_turns_contain_first_answers_and_an_interrupted_run_resumes() {
    let dir = tempfile::tempdir().unwrap();
    let [teacher, student, data, output] = ["teacher", "student", "data", "output"].map(|name| path(dir.path(), name));
    eloquent_model(Path::new(&teacher), 1);
    eloquent_model(Path::new(&student), 2);
    questions(&data);
    let words = evaluation("[ar, {jacobi: {n: 4}}]", [&teacher, &student, &data, &output]);
    let results: Value = serde_json::from_slice(&EVAL.succeed(&words).stdout).unwrap();
    let whole = read(&output);
    assert_eq!((results["examples"].as_u64(), whole.speeds.len()), (Some(6), 4 * 6));
    assert_eq!(results["models"][1]["strategies"][1]["exact_match_vs_ar"], json!(1.0));
    assert_eq!(results["models"][1]["strategies"][1]["accuracy"], Value::Null);
    expect_own_first_answers(&whole, [&teacher, &student]);
    expect_fastchat(&output, &whole);

    // An interruption left the first turns and one second turn. One first answer is changed, so
    // that it can be recognised in its second turn.
    let mut left = whole.clone();
    let (changed, text) = ((Role::Student, JACOBI, 2), "Ann has 12 pears and gives 7 of them to Tom. ".repeat(3));
    left.speeds.clear();
    left.answers.retain(|answer| answer.index % 2 == 0 || (answer.role, answer.index) == (Role::Teacher, 1));
    for answer in &mut left.answers {
        if (answer.role, answer.strategy, answer.index) == changed {
            answer.text.clone_from(&text);
        }
    }
    let samples = Path::new(&output).join("samples.jsonl");
    left.write(&samples).unwrap();
    fs::write(&samples, fs::read_to_string(&samples).unwrap() + "{\"kind\":\"answer\",\"ro").unwrap();
    let results: Value = serde_json::from_slice(&EVAL.succeed(&words).stdout).unwrap();
    let resumed = read(&output);
    expect_own_first_answers(&resumed, [&teacher, &student]);
    expect_fastchat(&output, &resumed);
    let second = |records: &Records, strategy| find(records, Role::Student, strategy, 3).clone();
    assert!(second(&resumed, JACOBI).prompt.contains(text.trim()));
    for answer in resumed
        .answers
        .iter()
        .filter(|answer| (answer.role, answer.strategy, answer.index - answer.index % 2) != changed)
    {
        let before = find(&whole, answer.role, answer.strategy, answer.index);
        assert_eq!((&answer.prompt, &answer.response_ids), (&before.prompt, &before.response_ids));
    }
    // Answers to different prompts are not compared.
    assert_ne!(second(&resumed, JACOBI).response_ids, second(&resumed, Strategy::Ar).response_ids);
    assert_eq!(second(&resumed, JACOBI).logit_gap_at_difference, None);
    assert_eq!(results["models"][1]["strategies"][1]["exact_match_vs_ar"], json!(1.0));
    // Every strategy is timed on the same prompt: the one with the autoregressive answer.
    let timed = |speed: &&cllm_eval::records::SpeedRecord| {
        (speed.role, speed.strategy, speed.index) == (Role::Student, JACOBI, 3)
    };
    let speed = resumed.speeds.iter().find(timed).unwrap();
    assert_ne!(second(&resumed, JACOBI).response_ids.len(), second(&whole, JACOBI).response_ids.len());
    assert_eq!(speed.tokens, second(&whole, JACOBI).response_ids.len());

    let scored = EVAL.succeed(&["score", &output, "--json"]).stdout;
    assert_eq!(serde_json::from_slice::<Value>(&scored).unwrap()["models"], results["models"]);
    assert_eq!(read(&output).answers, resumed.answers);
    expect_fastchat(&output, &resumed);
    EVAL.succeed(&["report", &output]);
}

#[test]
fn questions_without_two_turns_or_without_room_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let [teacher, data, output] = ["teacher", "data", "output"].map(|name| path(dir.path(), name));
    model(Path::new(&teacher), 1);
    questions(&data);
    let words = |more: &[&str]| -> Vec<String> {
        let given = [format!("teacher={teacher}"), format!("output={output}")];
        let fixed = ["run", "benchmark=mt-bench", "device=cpu"].map(str::to_owned);
        fixed.into_iter().chain(given).chain(more.iter().map(|&word| word.to_owned())).collect()
    };
    let data = format!("data={data}");
    // Two answers and the questions must fit into the context of 1,024 tokens.
    EVAL.fail(&words(&[&data, "max_new_tokens=500"]), 2, &["81/2", "up to 1000 new tokens"]);
    EVAL.fail(&words(&[&data, "split=dev"]), 2, &["only the split test"]);
    let prompts = path(dir.path(), "prompts.jsonl");
    let row = json!({ "id": "81/1", "source": "mt-bench/test", "prompt": "Tom?" });
    fs::write(&prompts, row.to_string()).unwrap();
    EVAL.fail(&words(&[&format!("prompts={prompts}")]), 2, &["81/1", "both turns"]);
}
