//! `serve`: OpenAI's protocol, who may use it, and how it ends.

use std::fs;
use std::io::Read;
use std::path::Path;

use cllm_testing::programs::{Program, copy_folder, path};
use serde_json::{Value, json};

use crate::made_up::{draft_adapters, thinking_model};
use crate::server::{Server, TEACHER, post_head, read_response, streamed_text};

const QUESTION: &str = "Mia fills 3 packs with 5 cards each and sells 2 cards. How many cards does Mia keep?";

/// What `generate` answers: the autoregressive answer and the one of Jacobi decoding.
fn generated(more: &[&str]) -> Value {
    let arguments = ["generate", QUESTION, "--model", TEACHER, "--device", "cpu", "--json", "--n", "8"];
    let run = Program("cllm-eval").succeed(&[&arguments[..], more].concat());
    serde_json::from_slice(&run.stdout).unwrap()
}

#[test]
fn answers_are_those_of_other_commands_as_a_whole_and_in_parts_with_every_strategy() {
    let expected = &generated(&["--max-new-tokens", "100"])["strategies"][1];
    for strategy in ["ar", "{jacobi: {n: 8}}", "{rolling: {n: auto}}", "{rolling: {n: 8, tree: 16}}"] {
        let server = Server::start(&[&format!("strategy={strategy}")]);
        let whole = server.chat(QUESTION, json!({ "max_tokens": 100 }));
        let answer = whole.json();
        assert_eq!(answer["choices"][0]["message"]["content"], expected["text"], "{}", whole.body);
        assert_eq!(answer["usage"]["completion_tokens"], expected["tokens"]);
        assert_eq!(answer["choices"][0]["finish_reason"], "stop");
        if strategy == "{jacobi: {n: 8}}" {
            assert!(answer["usage"]["tokens_per_forward"].as_f64().unwrap() > 1.0, "{answer}");
        }
        let options = json!({ "stream": true, "stream_options": { "include_usage": true }, "max_tokens": 100 });
        let events = server.chat(QUESTION, options).events();
        assert_eq!(json!(streamed_text(&events, 0)), expected["text"]);
        assert_eq!(events[0]["choices"][0]["delta"]["role"], "assistant");
        let [.., end, usage] = &events[..] else { panic!("{events:?}") };
        assert_eq!(end["choices"][0]["finish_reason"], "stop");
        assert_eq!(usage["usage"]["completion_tokens"], expected["tokens"]);
        let decoded: u64 = events.iter().filter_map(|event| event["decoded"]["tokens"].as_u64()).sum();
        assert_eq!(json!(decoded), expected["tokens"]);
    }
}

#[test]
fn a_completion_continues_texts_and_token_ids() {
    let server = Server::start(&[]);
    let text = server.complete(json!({ "prompt": "Mia has", "max_tokens": 8 })).json();
    let [answer] = &text["choices"].as_array().unwrap()[..] else { panic!("{text}") };
    assert_eq!((answer["finish_reason"].as_str(), &text["usage"]["completion_tokens"]), (Some("length"), &json!(8)));
    let scored = json!({ "prompt": "Mia has", "max_tokens": 8, "logprobs": 2 });
    let scored = server.complete(scored).json();
    let logprobs = &scored["choices"][0]["logprobs"];
    // Greedy decoding chooses the likeliest tokens.
    for (logprob, top) in
        logprobs["token_logprobs"].as_array().unwrap().iter().zip(logprobs["top_logprobs"].as_array().unwrap())
    {
        let likeliest = top.as_object().unwrap().values().map(|value| value.as_f64().unwrap()).fold(f64::MIN, f64::max);
        assert_eq!(logprob.as_f64().unwrap(), likeliest);
    }
    assert_eq!(logprobs["tokens"].as_array().unwrap().len(), 8);
    let body = json!({ "prompt": ["Mia has", "Tom"], "max_tokens": 8, "n": 2, "echo": true });
    let several = server.complete(body).json();
    let texts: Vec<&str> =
        several["choices"].as_array().unwrap().iter().map(|one| one["text"].as_str().unwrap()).collect();
    assert_eq!(texts.len(), 4);
    assert_eq!(texts[0], format!("Mia has{}", answer["text"].as_str().unwrap()));
    assert!(texts[0] == texts[1] && texts[2] == texts[3] && texts[2].starts_with("Tom"), "{texts:?}");
    let events = server.complete(json!({ "prompt": "Mia has", "max_tokens": 8, "stream": true, "n": 2 })).events();
    assert_eq!(json!(streamed_text(&events, 1)), answer["text"]);
}

#[test]
fn an_echo_without_tokens_gives_the_log_likelihoods_of_the_prompt() {
    let server = Server::start(&[]);
    let prompt = "Mia has 3 cards. ".repeat(8);
    let echo = |more: Value| {
        let mut body = json!({ "prompt": prompt, "echo": true, "logprobs": 1 });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        server.complete(body).json()["choices"][0].clone()
    };
    let alone = echo(json!({ "max_tokens": 0 }));
    assert_eq!(alone["text"], prompt);
    let logprobs = alone["logprobs"]["token_logprobs"].as_array().unwrap().clone();
    assert!(logprobs[0].is_null() && logprobs[1..].iter().all(|one| one.as_f64().unwrap() <= 0.0));
    let tokens: String =
        alone["logprobs"]["tokens"].as_array().unwrap().iter().map(|token| token.as_str().unwrap()).collect();
    assert_eq!(tokens, prompt);
    // As harnesses ask for them: with one more token.
    let longer = echo(json!({ "max_tokens": 1 }))["logprobs"]["token_logprobs"].as_array().unwrap().clone();
    assert_eq!(longer.len(), logprobs.len() + 1);
    for (one, other) in logprobs.iter().zip(&longer).skip(1) {
        assert!((one.as_f64().unwrap() - other.as_f64().unwrap()).abs() < 1e-5, "{one} {other}");
    }
    let chat = server.chat("Hello", json!({ "max_tokens": 3, "logprobs": true, "top_logprobs": 2 })).json();
    let content = chat["choices"][0]["logprobs"]["content"].as_array().unwrap().clone();
    assert_eq!(content.len(), 3, "{chat}");
    assert!(content.iter().all(|token| token["logprob"] == token["top_logprobs"][0]["logprob"]), "{chat}");
}

#[test]
fn offsets_count_the_characters_of_the_text() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model");
    copy_folder(Path::new(TEACHER), &model);
    // As tokenizers of Llama, it puts a token before a text that the text does not have.
    let file = model.join("tokenizer.json");
    let mut tokenizer: Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
    let [id, text] = [
        json!({ "SpecialToken": { "id": "<|user|>", "type_id": 0 } }),
        json!({ "Sequence": { "id": "A", "type_id": 0 } }),
    ];
    tokenizer["post_processor"] = json!({
        "type": "TemplateProcessing", "single": [id, text], "pair": [id, text, { "Sequence": { "id": "B", "type_id": 1 } }],
        "special_tokens": { "<|user|>": { "id": "<|user|>", "ids": [2], "tokens": ["<|user|>"] } },
    });
    fs::write(&file, tokenizer.to_string()).unwrap();
    let server = Server::start(&[&format!("model={}", model.display()), "eos_ids=[]"]);
    let offsets = |echo: bool| {
        let body = json!({ "prompt": "a数b<|user|>c", "echo": echo, "logprobs": 0, "max_tokens": 2 });
        let choice = server.complete(body).json()["choices"][0].clone();
        let offsets: Vec<u64> = serde_json::from_value(choice["logprobs"]["text_offset"].clone()).unwrap();
        (offsets, choice["logprobs"]["tokens"].clone())
    };
    let (echoed, tokens) = offsets(true);
    assert_eq!(
        (&tokens[0], &tokens[1], &tokens[5], &tokens[6]),
        (&json!("<|user|>"), &json!("a"), &json!("b"), &json!("<|user|>"))
    );
    // The three tokens of one character begin where it does.
    assert_eq!(echoed[..9], [0, 0, 1, 1, 1, 2, 3, 11, 12]);
    let (alone, _) = offsets(false);
    assert_eq!(alone, echoed[8..].iter().map(|offset| offset - 12).collect::<Vec<_>>());
}

/// The log-probabilities of a choice of a stream, with the lists of all its parts joined.
fn streamed_logprobs(events: &[Value], index: u64) -> Value {
    let choices = events.iter().filter_map(|event| event["choices"].get(0)).filter(|choice| choice["index"] == index);
    let mut joined = json!({});
    for (name, part) in choices.filter_map(|choice| choice["logprobs"].as_object()).flatten() {
        let list = joined[name].as_array().cloned().unwrap_or_default();
        joined[name] = json!([list, part.as_array().unwrap().clone()].concat());
    }
    joined
}

/// Fails unless two values are equal but for the rounding of their numbers.
#[track_caller]
fn assert_close(one: &Value, other: &Value) {
    match (one, other) {
        (Value::Number(one), Value::Number(other)) => {
            assert!((one.as_f64().unwrap() - other.as_f64().unwrap()).abs() < 1e-4, "{one} {other}");
        }
        (Value::Array(ones), Value::Array(others)) if ones.len() == others.len() => {
            ones.iter().zip(others).for_each(|(one, other)| assert_close(one, other));
        }
        (Value::Object(ones), Value::Object(others)) if ones.keys().eq(others.keys()) => {
            ones.values().zip(others.values()).for_each(|(one, other)| assert_close(one, other));
        }
        _ => assert_eq!(one, other),
    }
}

#[test]
fn the_parts_of_a_stream_have_the_log_probabilities_of_the_whole_answer() {
    let server = Server::start(&["strategy={rolling: {n: 8}}", "eos_ids=[]"]);
    let messages = json!([{ "role": "user", "content": QUESTION }]);
    let long = "Mia has 3 cards. ".repeat(20);
    let requests = [
        ("chat/completions", json!({ "messages": messages, "logprobs": true, "top_logprobs": 3 })),
        (
            "chat/completions",
            json!({ "messages": messages, "logprobs": true, "stop": "card", "n": 2, "temperature": 1 }),
        ),
        ("completions", json!({ "prompt": [long, "Tom"], "logprobs": 2, "n": 2, "temperature": 2 })),
        ("completions", json!({ "prompt": [long, "Tom"], "logprobs": 0, "echo": true })),
        ("completions", json!({ "prompt": long, "logprobs": 1, "echo": true, "max_tokens": 0 })),
    ];
    // All at the same time: the texts that are scored take turns.
    std::thread::scope(|scope| {
        for (path, mut body) in requests {
            let server = &server;
            scope.spawn(move || {
                let path = format!("/v1/{path}");
                body["seed"] = json!(7);
                body["max_tokens"] = body.get("max_tokens").cloned().unwrap_or(json!(60));
                let whole = server.post(&path, &body).json();
                body["stream"] = json!(true);
                let events = server.post(&path, &body).events();
                for choice in whole["choices"].as_array().unwrap_or_else(|| panic!("{whole}")) {
                    let index = choice["index"].as_u64().unwrap();
                    let text = choice["text"].as_str().or(choice["message"]["content"].as_str());
                    assert_eq!(Some(streamed_text(&events, index).as_str()), text);
                    assert!(!choice["logprobs"].is_null(), "{choice}");
                    assert_close(&streamed_logprobs(&events, index), &choice["logprobs"]);
                }
                // A part has as many log-probabilities as its forward accepted tokens.
                for event in events.iter().filter(|event| event["decoded"].is_object()) {
                    let logprobs = &event["choices"][0]["logprobs"];
                    let tokens = logprobs["content"].as_array().or(logprobs["tokens"].as_array()).map(Vec::len);
                    assert_eq!(json!(tokens), event["decoded"]["tokens"], "{event}");
                }
            });
        }
    });
}

#[test]
fn a_stop_text_ends_an_answer_and_is_not_in_it() {
    let server = Server::start(&[]);
    let text = |more: Value| server.chat(QUESTION, more).json()["choices"][0]["message"]["content"].clone();
    let whole = text(json!({}));
    let whole = whole.as_str().unwrap();
    // Across tokens, and in the middle of one.
    let stop: String = whole.chars().skip(whole.chars().count() / 2).take(9).collect();
    let (before, _) = whole.split_once(&stop).unwrap();
    assert_eq!(text(json!({ "stop": stop })), before);
    let options =
        json!({ "stop": ["never to be seen", stop], "stream": true, "stream_options": { "include_usage": true } });
    let events = server.chat(QUESTION, options).events();
    assert_eq!(streamed_text(&events, 0), before);
    assert_eq!(events[events.len() - 2]["choices"][0]["finish_reason"], "stop");
}

#[test]
fn sampling_is_repeated_by_its_seed_in_any_batch_and_differs_between_choices() {
    let server = Server::start(&["strategy={rolling: {n: 4}}"]);
    let texts = |server: &Server, more: Value| -> Vec<String> {
        let mut body = json!({ "temperature": 2, "max_tokens": 40, "n": 3 });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let choices = server.chat("Cards", body).json()["choices"].as_array().unwrap().clone();
        choices.iter().map(|one| one["message"]["content"].as_str().unwrap().to_owned()).collect()
    };
    let sampled = texts(&server, json!({ "seed": 7 }));
    assert!(sampled[0] != sampled[1] && sampled[1] != sampled[2], "{sampled:?}");
    // Beside greedy and other sampled answers, the same ones.
    let greedy = texts(&server, json!({ "temperature": 0 }));
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                assert_eq!(texts(&server, json!({ "seed": 7 })), sampled);
                assert_eq!(texts(&server, json!({ "temperature": 0 })), greedy);
            });
        }
    });
    assert_ne!(texts(&server, json!({})), texts(&server, json!({})), "without a seed, answers differ");
    let autoregressive = |more: Value| {
        let mut body = json!({ "seed": 7, "model": format!("{TEACHER}:ar") });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        texts(&server, body)
    };
    assert_eq!(autoregressive(json!({})), sampled);
    // The nucleus, from everything to the likeliest token.
    assert_eq!(texts(&server, json!({ "seed": 7, "top_p": 1 })), sampled);
    let nucleus = texts(&server, json!({ "seed": 7, "top_p": 0.8 }));
    assert!(nucleus != sampled && nucleus != greedy && nucleus[0] != nucleus[1], "{nucleus:?}");
    assert_eq!(autoregressive(json!({ "top_p": 0.8 })), nucleus);
    assert_eq!(texts(&server, json!({ "seed": 7, "top_p": 0 })), greedy);
}

#[test]
fn prompts_that_begin_alike_are_cached_once() {
    let server = Server::start(&[]);
    let system = json!({ "role": "system", "content": "You count cards. ".repeat(12) });
    let ask = |question: &str| {
        let messages = json!([system, { "role": "user", "content": question }]);
        server.post("/v1/chat/completions", &json!({ "messages": messages, "max_tokens": 20 })).json()
    };
    let first = ask(QUESTION);
    assert_eq!(first["usage"]["prompt_tokens_details"]["cached_tokens"], 0);
    let again = ask(QUESTION);
    assert_eq!(again["choices"], first["choices"]);
    let cached = again["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap();
    let prompt = again["usage"]["prompt_tokens"].as_u64().unwrap();
    assert!(cached > prompt - 33 && cached < prompt, "{cached} of {prompt}");
    let other = ask("How many cards are 2 packs of 7 cards?");
    assert!(other["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap() >= 32, "{other}");
    assert_eq!(
        server.metric("cllm_cached_prompt_tokens_total", TEACHER) as u64,
        cached + 32 * (other["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap() / 32)
    );
}

#[test]
fn models_metrics_health_and_the_page_are_there() {
    let server = Server::start(&[]);
    assert_eq!(server.get("/health").json(), json!({ "status": "ok" }));
    let models = server.get("/v1/models").json();
    let of = |key: &str| -> Vec<Value> {
        models["data"].as_array().unwrap().iter().map(|model| model[key].clone()).collect()
    };
    assert_eq!(of("id"), [TEACHER.to_owned(), format!("{TEACHER}:ar")]);
    assert_eq!(of("strategy"), ["rolling n=16", "ar"]);
    assert_eq!(server.get(&format!("/v1/models/{TEACHER}")).json()["max_model_len"], 512);
    server.chat(QUESTION, json!({}));
    let tokens = server.metric("cllm_tokens_total", TEACHER);
    assert!(tokens > 10.0 && server.metric("cllm_forwards_total", TEACHER) <= tokens);
    assert_eq!(server.metric("cllm_responses_total", "chat/completions"), 1.0);
    assert_eq!(server.metric("cllm_first_token_seconds_count", TEACHER), 1.0);
    for path in ["/", "/page.css", "/page.js"] {
        let file = server.get(path);
        assert!(
            file.status == 200 && file.head.contains("content-security-policy: default-src 'none'"),
            "{}",
            file.head
        );
    }
}

#[test]
fn what_is_wrong_with_a_request_is_said_with_its_field() {
    let server = Server::start(&["max_body_bytes=20000", "context=200"]);
    let chat = |more: Value| server.chat("Hello", more);
    let long = "word ".repeat(300);
    for (response, status, param, code) in [
        (chat(json!({ "model": "gpt-4" })), 404, Some("model"), Some("model_not_found")),
        (chat(json!({ "top_p": 1.5, "temperature": 1 })), 400, Some("top_p"), None),
        (chat(json!({ "tools": [{}] })), 400, Some("tools"), Some("unsupported_parameter")),
        (chat(json!({ "max_tokens": 1000 })), 400, Some("messages"), Some("context_length_exceeded")),
        (chat(json!({ "n": 128, "max_tokens": "x" })), 400, Some("max_tokens"), None),
        (server.chat(&long, json!({})), 400, Some("messages"), Some("context_length_exceeded")),
        (server.chat(&long.repeat(20), json!({})), 413, None, Some("body_too_large")),
        (server.complete(json!({ "prompt": "" })), 400, Some("prompt"), None),
        (server.complete(json!({ "prompt": [1, 512] })), 400, Some("prompt"), None),
        (server.complete(json!({ "prompt": "a", "suffix": "b" })), 400, Some("suffix"), Some("unsupported_parameter")),
        (server.get("/v1/completions"), 405, None, Some("method_not_allowed")),
        (server.get("/v2"), 404, None, Some("unknown_url")),
        (server.send("POST /v1/completions HTTP/1.1", b"{}"), 415, None, Some("wrong_content_type")),
        (server.send(&post_head("/v1/completions"), b"{"), 400, None, Some("invalid_json")),
    ] {
        let error = response.json()["error"].clone();
        assert_eq!(
            (response.status, error["param"].as_str(), error["code"].as_str()),
            (status, param, code),
            "{error}"
        );
        assert!(!error["message"].as_str().unwrap().is_empty());
    }
    assert_eq!(server.chat("Hello", json!({})).status, 200);
}

#[test]
fn only_those_with_the_key_may_ask_and_no_page_of_another_origin() {
    let server = Server::start_with(&[], |command| {
        command.env("CLLM_API_KEY", "sesame");
    });
    let status = |header: &str| server.send(&format!("GET /v1/models HTTP/1.1{header}"), b"").status;
    let bearer = |key: &str| format!("\r\nAuthorization: Bearer {key}");
    assert_eq!([status(""), status(&bearer("sesam")), status(&bearer("sesamee"))], [401; 3]);
    assert_eq!((status(&bearer("sesame")), server.get("/health").status, server.get("/").status), (200, 200, 200));
    assert_eq!(server.get("/metrics").status, 401);
    let open = Server::start(&["cors_origins=[https://a.example]"]);
    let with = |header: &str| open.send(&format!("GET /v1/models HTTP/1.1\r\n{header}"), b"");
    assert!(with("Origin: https://a.example").head.contains("access-control-allow-origin: https://a.example"));
    assert!(!with("Origin: https://b.example").head.contains("access-control-allow-origin"));
    // A name of a web page that has been given this machine's address.
    let mut stream = open.connect();
    std::io::Write::write_all(&mut stream, b"GET /v1/models HTTP/1.1\r\nHost: b.example\r\nConnection: close\r\n\r\n")
        .unwrap();
    assert_eq!(read_response(stream).status, 403);
}

#[test]
fn more_requests_than_may_wait_are_told_to_come_again() {
    let server = Server::start(&["batch_size=1", "max_queue=1", "max_new_tokens=400", "eos_ids=[]"]);
    let body = json!({ "prompt": "Mia", "stream": true }).to_string();
    let mut streams: Vec<_> = (0..2)
        .map(|_| {
            let mut stream = server.connect();
            server.write_request(&mut stream, &post_head("/v1/completions"), body.as_bytes());
            // The first bytes of the response: it has its room.
            stream.read_exact(&mut [0; 12]).unwrap();
            stream
        })
        .collect();
    let refused = server.complete(json!({ "prompt": "Mia" }));
    assert!(refused.status == 429 && refused.head.contains("retry-after: 1"), "{}", refused.head);
    assert_eq!(server.complete(json!({ "prompt": "Mia", "n": 3 })).json()["error"]["param"], "n");
    // The room of clients that have gone is free again.
    streams.clear();
    while server.complete(json!({ "prompt": "Mia", "max_tokens": 2 })).status == 429 {}
}

#[test]
fn after_sigterm_running_answers_end_and_then_the_server() {
    let server = Server::start(&["max_new_tokens=300", "eos_ids=[]"]);
    let mut stream = server.connect();
    let body = json!({ "prompt": "Mia", "stream": true, "stream_options": { "include_usage": true } });
    server.write_request(&mut stream, &post_head("/v1/completions"), body.to_string().as_bytes());
    let mut begin = [0; 12];
    stream.read_exact(&mut begin).unwrap();
    server.signal("TERM");
    let mut rest = String::new();
    stream.read_to_string(&mut rest).unwrap();
    assert!(rest.contains("\"completion_tokens\":300") && rest.contains("[DONE]"), "{rest}");
    let (code, said) = server.wait();
    assert!(code == Some(0) && said.contains("stopping: running answers have 30 s to end"), "{code:?} {said}");
}

#[test]
fn answers_that_have_no_time_left_say_why() {
    let endless = ["batch_size=1", "max_new_tokens=400", "eos_ids=[]"];
    let server = Server::start(&[&endless[..], &["drain_seconds=0"]].concat());
    let mut stream = server.connect();
    let body = json!({ "prompt": "Mia", "n": 32, "stream": true });
    server.write_request(&mut stream, &post_head("/v1/completions"), body.to_string().as_bytes());
    stream.read_exact(&mut [0; 12]).unwrap();
    server.signal("TERM");
    let mut rest = String::new();
    stream.read_to_string(&mut rest).unwrap();
    assert!(rest.contains("server_stopping") && !rest.contains("[DONE]"), "{rest}");
    assert_eq!(server.wait().0, Some(1));
}

#[test]
fn an_answer_that_takes_too_long_is_cut() {
    let server = Server::start(&["batch_size=1", "max_new_tokens=400", "eos_ids=[]", "timeout_seconds=1"]);
    // Far more tokens than a second is enough for.
    let late = server.complete(json!({ "prompt": "Mia", "n": 128 }));
    assert_eq!((late.status, late.json()["error"]["code"].as_str()), (504, Some("timeout")));
    assert_eq!(server.complete(json!({ "prompt": "Mia", "max_tokens": 2 })).status, 200);
}

#[test]
fn a_teacher_is_served_beside_the_model_that_drafts_for_it() {
    let server = Server::start(&[&format!("teacher={TEACHER}"), "strategy={drafted: {n: 4}}"]);
    let expected = &generated(&["--max-new-tokens", "100"])["strategies"][0]["text"];
    for (model, tokens_per_forward) in [(TEACHER.to_owned(), 1.01..4.0), (format!("{TEACHER}:ar"), 1.0..1.01)] {
        let answer = server.chat(QUESTION, json!({ "max_tokens": 100, "model": model })).json();
        assert_eq!(&answer["choices"][0]["message"]["content"], expected);
        assert!(tokens_per_forward.contains(&answer["usage"]["tokens_per_forward"].as_f64().unwrap()), "{answer}");
    }
}

#[test]
fn a_model_with_adapters_for_drafts_is_served_with_them_and_says_so_if_it_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let adapter = dir.path().join("adapter");
    draft_adapters(&adapter, Path::new(TEACHER));
    let model = format!("model={}", adapter.display());
    let server = Server::start(&[&model, "batch_size=2"]);
    assert_eq!(server.get("/v1/models").json()["data"][0]["strategy"], "gated n=16");
    let expected = &generated(&["--max-new-tokens", "100"])["strategies"][0];
    let options = || json!({ "max_tokens": 100 });
    // Alone, and beside another answer.
    let alone = server.chat(QUESTION, options()).json();
    let together = std::thread::scope(|scope| {
        let server = &server;
        let ask = |question| scope.spawn(move || server.chat(question, options()).json());
        let [other, again] = ["How many cards are 2 packs of 7 cards?", QUESTION].map(ask);
        other.join().unwrap();
        again.join().unwrap()
    });
    for answer in [alone, together] {
        assert_eq!(answer["choices"][0]["message"]["content"], expected["text"], "{answer}");
        assert_eq!(answer["usage"]["completion_tokens"], expected["tokens"], "{answer}");
    }
    let events = server.chat(QUESTION, json!({ "max_tokens": 100, "stream": true })).events();
    assert_eq!(json!(streamed_text(&events, 0)), expected["text"]);
    // A prompt of which most is cached already.
    let complete = |model: &str| {
        let body = json!({ "model": model, "prompt": "Mia has 3 cards. ".repeat(8), "max_tokens": 20 });
        server.complete(body).json()
    };
    let name = adapter.display().to_string();
    let [first, again, ar] = [&name, &name, &format!("{name}:ar")].map(|model| complete(model));
    assert_eq!([&again["choices"][0]["text"], &ar["choices"][0]["text"]], [&first["choices"][0]["text"]; 2]);
    assert!(again["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap() >= 32, "{again}");

    let teacher = format!("teacher={TEACHER}");
    for settings in [&["strategy=ar"][..], &["strategy={drafted: {n: 4}}", &teacher[..]]] {
        let server = Server::start(&[&[&model[..]][..], settings].concat());
        server.signal("TERM");
        let (_, said) = server.wait();
        assert!(said.contains("no strategy uses its adapters for draft tokens"), "{said}");
    }
}

#[test]
fn a_thought_is_closed_at_its_limit() {
    let dir = tempfile::tempdir().unwrap();
    let model = path(dir.path(), "model");
    thinking_model(Path::new(&model), 1);
    let of_model = format!("model={model}");
    let server = Server::start(&[&of_model, "max_thinking_tokens=5", "max_new_tokens=30", "eos_ids=[]"]);
    let answer = |more: Value| {
        let mut body = json!({ "prompt": "Tom has<think>" });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        server.complete(body)
    };
    let closed = answer(json!({})).json();
    let (thought, rest) = closed["choices"][0]["text"].as_str().unwrap().split_once("\n</think>\n\n").unwrap();
    assert!(!thought.is_empty() && !rest.is_empty() && closed["usage"]["completion_tokens"] == 30, "{closed}");
    assert_eq!(answer(json!({ "model": format!("{model}:ar") })).json()["choices"], closed["choices"]);
    // Where there is no room for an answer after it, the answer ends first.
    let cut = answer(json!({ "max_tokens": 6 })).json();
    let text = cut["choices"][0]["text"].as_str().unwrap();
    assert!(text.starts_with(thought) && !text.contains("</think>"), "{cut}");
    assert_eq!(
        (&cut["usage"]["completion_tokens"], &cut["choices"][0]["finish_reason"]),
        (&json!(6), &json!("length"))
    );
}

#[test]
fn settings_that_do_not_fit_are_refused_before_the_model_is_loaded() {
    let model = format!("model={TEACHER}");
    for (setting, part) in [
        ("context=1000", "set context to 512 at most"),
        ("strategy={drafted: {n: 4}}", "set teacher=..."),
        ("max_thinking_tokens=20", "no tokens <think>"),
        ("cors_origins=['*']", "`*` is no origin"),
        ("batch_size=0", "batch_size"),
        ("api_key=x", "unknown key `api_key`"),
    ] {
        Program("cllm-eval").fail(&["serve", &model, "device=cpu", setting], 2, &[part]);
    }
    Program("cllm-eval").fail(&["serve", "device=cpu"], 2, &["model is not set"]);
}

mod needs_openai {
    use std::process::Command;

    use super::*;

    #[test]
    #[ignore = "needs the Python package openai: scripts/test --openai"]
    fn the_official_client_reads_all_that_is_sent() {
        let server = Server::start(&[]);
        let client = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/openai-client.py");
        let url = format!("http://{}", server.address);
        let output = Command::new("python3").args([client, &url, TEACHER]).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let got: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(got["models"], json!([TEACHER, format!("{TEACHER}:ar")]));
        assert!(got["whole"] == got["streamed"] && got["whole"].as_str().unwrap().len() > 10, "{got}");
        assert_eq!(json!(got["logprobs"].as_array().unwrap().len()), got["tokens"], "{got}");
        assert!(
            got["streamed_logprobs"] == got["logprobs"] && got["usage"]["completion_tokens"] == got["tokens"],
            "{got}"
        );
        assert!(got["usage"]["tokens_per_forward"].as_f64().unwrap() >= 1.0, "{got}");
        assert!(got["completions"][0] == got["parts"] && got["completions"][1] == got["parts"], "{got}");
        assert_eq!(got["refusal"], json!({ "param": "presence_penalty", "code": "unsupported_parameter" }));
    }
}
