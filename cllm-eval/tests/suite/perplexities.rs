//! Perplexity of texts: its files, resuming, and what is refused.

use std::fs;
use std::path::Path;

use cllm_core::checkpoint;
use cllm_core::tokenizer::Tokenizer;
use cllm_eval::records::Records;
use serde_json::Value;
use tch::{Device, Kind, Tensor};

use crate::made_up::model;
use cllm_testing::programs::{Program, path};

const EVAL: Program = Program("cllm-eval");

/// A text of several windows.
fn text() -> String {
    (0..900).map(|number| format!("Tom has {} apples. ", number * number % 97)).collect()
}

fn run(of: &[(&str, &str)], data: &str, output: &str) -> Vec<String> {
    let fixed = ["run", "benchmark=perplexity", "device=cpu", "--json"].map(str::to_owned);
    let models = of.iter().map(|(role, folder)| format!("{role}={folder}"));
    fixed.into_iter().chain(models).chain([format!("data={data}"), format!("output={output}")]).collect()
}

/// Mean negative log-likelihood, tokens and windows as Hugging Face's guide computes them, with a
/// window of 1,024 and a stride of 512.
fn by_hand(folder: &str, text: &str) -> (f64, usize, usize) {
    let model = checkpoint::load(Path::new(folder), Device::Cpu, Kind::Float).unwrap();
    let ids = Tokenizer::load(Path::new(folder)).unwrap().encode(text).unwrap();
    let (mut nll, mut tokens, mut windows, mut before) = (0.0, 0, 0, 0);
    for begin in (0..ids.len()).step_by(512) {
        let end = (begin + 1024).min(ids.len());
        let window: Vec<i64> = ids[begin..end].iter().map(|&id| i64::from(id)).collect();
        let positions = Tensor::arange(window.len() as i64, (Kind::Int64, Device::Cpu)).unsqueeze(0);
        let hidden = model.forward(&Tensor::from_slice(&window).unsqueeze(0), &positions);
        let likelihoods =
            tch::no_grad(|| model.compute_logits(&hidden)).unwrap().log_softmax(-1, Kind::Double).squeeze_dim(0);
        for position in before.max(1)..end {
            nll -= likelihoods.double_value(&[(position - begin - 1) as i64, window[position - begin]]);
            tokens += 1;
        }
        windows += 1;
        before = end;
        if end == ids.len() {
            break;
        }
    }
    (nll / tokens as f64, tokens, windows)
}

#[test]
fn both_models_get_a_perplexity_and_an_interrupted_run_resumes() {
    let dir = tempfile::tempdir().unwrap();
    let [teacher, student, data, output] = ["teacher", "student", "a.txt", "output"].map(|name| path(dir.path(), name));
    model(Path::new(&teacher), 1);
    model(Path::new(&student), 2);
    fs::write(&data, text()).unwrap();
    let words = run(&[("teacher", &teacher), ("student", &student)], &data, &output);
    let results: Value = serde_json::from_slice(&EVAL.succeed(&words).stdout).unwrap();
    for (number, folder) in [&teacher, &student].into_iter().enumerate() {
        let model = &results["models"][number];
        let (nll, tokens, windows) = by_hand(folder, &text());
        assert!(windows > 4, "{windows}");
        let figure = |key: &str| model["perplexity"][key].as_f64().unwrap();
        assert!((figure("nll") - nll).abs() < 1e-4 && (figure("value") - nll.exp()).abs() < 0.05, "{model} {nll}");
        assert_eq!((figure("tokens"), figure("windows")), (tokens as f64, windows as f64));
        let ends = &model["perplexity"]["ci95"];
        assert!(ends[0].as_f64().unwrap() < figure("value") && figure("value") < ends[1].as_f64().unwrap(), "{ends}");
        assert_eq!(model["strategies"], Value::Array(vec![]));
    }
    assert_eq!(results["paired"], Value::Array(vec![]));
    // A kill left the teacher's windows, the first of the student's windows, and half a line.
    let samples = Path::new(&output).join("samples.jsonl");
    let whole = fs::read_to_string(&samples).unwrap();
    let measured = Records::read(&samples).unwrap();
    let lines: Vec<&str> = whole.split_inclusive('\n').collect();
    assert!(lines[1..].iter().all(|line| line.contains(r#""kind":"window""#)), "{whole}");
    let kept = 1 + (lines.len() - 1) / 2 + 1;
    // The changed likelihood shows that finished windows are not measured again.
    let mut left = Records::read(&samples).unwrap();
    left.windows.truncate(kept - 1);
    left.windows[0].nll += 1.0;
    left.write(&samples).unwrap();
    fs::write(&samples, fs::read_to_string(&samples).unwrap() + &lines[kept][..20]).unwrap();
    EVAL.succeed(&words);
    let mut resumed = Records::read(&samples).unwrap();
    resumed.windows[0].nll -= 1.0;
    assert_eq!(resumed, measured);
    // The saved records are enough to score and to report; there are no scored answers to compare.
    let score: Value = serde_json::from_slice(&EVAL.succeed(&["score", &output, "--json"]).stdout).unwrap();
    assert_eq!(score["models"][1], results["models"][1]);
    EVAL.succeed(&["report", &output]);
    let text = String::from_utf8(EVAL.succeed(&["score", &output]).stdout).unwrap();
    assert!(text.contains("teacher: perplexity ") && text.contains("student: perplexity "), "{text}");
    EVAL.fail(&["compare", &output], 2, &["perplexities"]);
    EVAL.fail(&["tradeoff", &output], 2, &["no scored answer"]);
    // The saved settings can be run again.
    let settings = Path::new(&output).join("config.yaml").display().to_string();
    EVAL.succeed(&["run", "-c", &settings]);
}

#[test]
fn each_row_is_a_text_and_files_without_text_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let [teacher, data, output] = ["teacher", "data", "output"].map(|name| path(dir.path(), name));
    model(Path::new(&teacher), 1);
    fs::create_dir_all(&data).unwrap();
    let rows = Path::new(&data).join("rows.jsonl");
    fs::write(&rows, "{\"text\": \"Tom has 3 apples.\"}\n{\"text\": \"\"}\n{\"text\": \"Ann has 4 pears.\"}\n")
        .unwrap();
    let of = [("teacher", teacher.as_str())];
    EVAL.succeed(&run(&of, &data, &output));
    let windows = Records::read(&Path::new(&output).join("samples.jsonl")).unwrap().windows;
    let starts: Vec<_> = windows.iter().map(|window| (window.index, window.id.as_str(), window.start)).collect();
    assert_eq!(starts, [(0, "text-1", 0), (2, "text-3", 0)]);
    let other = path(dir.path(), "other");
    EVAL.fail(&run(&of, "no/such.txt", &other), 2, &["no/such.txt"]);
    let empty = path(dir.path(), "empty.txt");
    fs::write(&empty, "").unwrap();
    EVAL.fail(&run(&of, &empty, &other), 2, &["2 tokens"]);
    fs::write(&rows, "{\"txt\": \"a\"}\n").unwrap();
    EVAL.fail(&run(&of, &data, &other), 2, &["rows.jsonl", "line 1", "text"]);
    let words = ["run", "benchmark=perplexity", &format!("teacher={teacher}"), "device=cpu"].map(str::to_owned);
    EVAL.fail(&words, 2, &["perplexity needs `data`"]);
}
