//! A small thinking model with its own chat template through all three programs, with and without
//! thinking: every prompt is what `transformers` recorded (cllm-core/tests/fixtures/record-thinking).

use std::fs;
use std::path::Path;

use cllm_core::checkpoint;
use cllm_core::trajectory::Reader;
use cllm_eval::records::{Records, SAMPLES};
use cllm_testing::programs::{Program, path};
use serde_json::{Value, json};
use tch::Kind;

const DATA: Program = Program("cllm-data");
const TRAIN: Program = Program("cllm-train");
const EVAL: Program = Program("cllm-eval");

fn recorded() -> Value {
    serde_json::from_str(include_str!("../../../cllm-core/tests/fixtures/thinking/recorded.json")).unwrap()
}

/// Writes a random model of the family Qwen3 with the tokenizer and the template of the records.
fn write_model(folder: &Path) {
    let mut config = cllm_testing::families::shapes().into_iter().find(|(name, _)| *name == "qwen3").unwrap().1;
    let sizes = [("vocab_size", 400), ("max_position_embeddings", 1024)];
    config.as_object_mut().unwrap().extend(sizes.map(|(key, size)| (key.to_owned(), json!(size))));
    fs::create_dir(folder).unwrap();
    checkpoint::save(&cllm_testing::families::random_model(&config, 5), folder, Kind::Float).unwrap();
    let tokenizer = Path::new(env!("CARGO_MANIFEST_DIR")).join("../cllm-core/tests/fixtures/thinking");
    for file in ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"] {
        fs::copy(tokenizer.join(file), folder.join(file)).unwrap();
    }
}

/// Writes the recorded prompts that were rendered with these variables; returns their texts.
fn write_prompts(file: &str, kwargs: &Value) -> Vec<String> {
    let recorded = recorded();
    let cases = recorded["prompts"].as_array().unwrap().iter().filter(|case| case["chat_template_kwargs"] == *kwargs);
    let (mut lines, mut texts) = (String::new(), Vec::new());
    for (index, case) in cases.enumerate() {
        let mut row = json!({ "id": index.to_string(), "messages": case["messages"], "reference": "It is five." });
        if case["tools"] != json!([]) {
            row["tools"] = case["tools"].clone();
        }
        lines += &format!("{row}\n");
        texts.push(case["text"].as_str().unwrap().to_owned());
    }
    fs::write(file, lines).unwrap();
    texts
}

#[test]
fn every_program_renders_as_transformers_with_and_without_thinking() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| path(dir.path(), name);
    write_model(&dir.path().join("model"));

    // Supervised fine-tuning on every turn of conversations of two turns.
    let conversation = &recorded()["turns"][4]["messages"];
    let row = json!({ "id": "two", "messages": conversation.as_array().unwrap()[..3], "reference": conversation[3]["content"] });
    fs::write(at("two-turns.jsonl"), format!("{row}\n")).unwrap();
    let sft = |output: &str, more: &[&str]| {
        let (model, data) = (format!("model={}", at("model")), format!("datasets=[{}]", at("two-turns.jsonl")));
        let output = format!("output={}", at(output));
        let mut arguments = vec!["run", &model, "objective=sft", &data, &output, "sft.turns=all", "device=cpu"];
        arguments.extend(["max_steps=2", "max_batch_tokens=512", "max_example_tokens=512", "save_every=null"]);
        arguments.extend(more);
        TRAIN.succeed(&arguments);
    };
    sft("teacher", &[]);
    let teacher = at("teacher/final");

    for (name, kwargs) in [("thinking", json!({})), ("not", json!({ "enable_thinking": false }))] {
        let (prompts, data, results) =
            (at(&format!("{name}.jsonl")), at(&format!("{name}-data")), at(&format!("{name}-eval")));
        let texts = write_prompts(&prompts, &kwargs);
        let (prompts, kwargs) = (format!("prompts={prompts}"), format!("chat_template_kwargs={kwargs}"));
        let (model, output) = (format!("model={teacher}"), format!("output={data}"));
        let collect = [&model, &prompts, &kwargs, &output].map(String::as_str);
        DATA.succeed(&[&["collect", "n=4", "max_new_tokens=6", "device=cpu"][..], &collect].concat());
        let rows: Vec<_> = Reader::open(Path::new(&data)).unwrap().rows().map(Result::unwrap).collect();
        assert_eq!(rows.iter().map(|row| &row.prompt).collect::<Vec<_>>(), texts.iter().collect::<Vec<_>>());

        let (model, output) = (format!("teacher={teacher}"), format!("output={results}"));
        let run = [&model, &prompts, &output].map(String::as_str);
        let run =
            [&["run", "max_new_tokens=4", "strategies=[ar]", "num_speed_examples=0", "device=cpu"][..], &run].concat();
        EVAL.succeed(&[&run[..], &[&kwargs]].concat());
        let records = Records::read(&Path::new(&results).join(SAMPLES)).unwrap();
        assert_eq!(
            records.answers.iter().map(|answer| &answer.prompt).collect::<Vec<_>>(),
            texts.iter().collect::<Vec<_>>()
        );
        // Other variables are another evaluation.
        let other = "chat_template_kwargs={enable_thinking: null}";
        EVAL.fail(&[&run[..], &[other]].concat(), 2, &["was started with chat_template_kwargs=", "this command says"]);
    }

    // A model that was trained with a template of one's own carries it.
    fs::write(at("own.jinja"), "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}").unwrap();
    sft("own", &[&format!("chat_template={}", at("own.jinja"))]);
    assert_eq!(fs::read(at("own/final/chat_template.jinja")).unwrap(), fs::read(at("own.jinja")).unwrap());
}
