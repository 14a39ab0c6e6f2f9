//! A server under load: clients that arrive, stream, stall and vanish at random, and requests that
//! are malformed. Every answer is the one that its request has alone.

use std::io::Read;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde_json::{Value, json};

use crate::server::{Response, Server, post_head, read_response, streamed_text};

const SETTINGS: [&str; 3] = ["batch_size=8", "max_queue=1000", "strategy={rolling: {n: 8}}"];

/// A request and the text that it has alone.
struct Known {
    body: Value,
    text: String,
}

fn known_requests(server: &Server, number: u64) -> Vec<Known> {
    let with_answer = |index: u64| {
        let prompt = format!(
            "{}Tom has {index} apples and buys {} more.",
            "Count well. ".repeat(index as usize % 12),
            index % 7
        );
        let temperature = [0.0, 0.0, 1.0][index as usize % 3];
        let logprobs = [Some(1), None, None, None][index as usize % 4];
        let body = json!({
            "prompt": prompt, "max_tokens": 5 + index % 60, "temperature": temperature, "seed": index, "logprobs": logprobs,
        });
        let text = text_of(&server.complete(body.clone()));
        Known { body, text }
    };
    (0..number).map(with_answer).collect()
}

fn text_of(response: &Response) -> String {
    let answer = response.json();
    answer["choices"][0]["text"].as_str().unwrap_or_else(|| panic!("{answer}")).to_owned()
}

fn streamed(known: &Known) -> String {
    let mut body = known.body.clone();
    body["stream"] = json!(true);
    body.to_string()
}

/// One client after another, until the time is up or as many have come. Returns how many answers were
/// compared.
fn client(server: &Server, known: &[Known], seed: u64, max_visits: usize, end: Instant) -> u64 {
    let mut random = StdRng::seed_from_u64(seed);
    let (mut num_compared, mut stalled) = (0, Vec::new());
    for _ in 0..max_visits {
        if Instant::now() > end {
            break;
        }
        let one = &known[random.random_range(0..known.len())];
        let mut stream = server.connect();
        match random.random_range(0..6) {
            0 => {
                assert_eq!(text_of(&server.complete(one.body.clone())), one.text, "{}", one.body);
                num_compared += 1;
            }
            1 | 2 => {
                server.write_request(&mut stream, &post_head("/v1/completions"), streamed(one).as_bytes());
                assert_eq!(streamed_text(&read_response(stream).events(), 0), one.text, "{}", one.body);
                num_compared += 1;
            }
            // Stalls: what is left is read when others have been served.
            3 => {
                server.write_request(&mut stream, &post_head("/v1/completions"), streamed(one).as_bytes());
                stalled.push((stream, one));
            }
            // Vanishes: with the answer under way, or before.
            4 => {
                server.write_request(&mut stream, &post_head("/v1/completions"), streamed(one).as_bytes());
                stream.read_exact(&mut vec![0; random.random_range(1..600)]).unwrap_or_default();
            }
            _ => server.write_request(&mut stream, &post_head("/v1/completions"), one.body.to_string().as_bytes()),
        }
        if stalled.len() > 3 {
            let (stream, one) = stalled.remove(0);
            assert_eq!(streamed_text(&read_response(stream).events(), 0), one.text, "{}", one.body);
            num_compared += 1;
        }
    }
    for (stream, one) in stalled {
        assert_eq!(streamed_text(&read_response(stream).events(), 0), one.text, "{}", one.body);
        num_compared += 1;
    }
    num_compared
}

/// Runs clients until the time is up or each has come so often, and asserts that the server has
/// nothing left to do then. Returns how many answers were compared.
fn load(server: &Server, known: &[Known], num_clients: u64, max_visits: usize, time: Duration) -> u64 {
    let (end, num_compared) = (Instant::now() + time, AtomicU64::new(0));
    std::thread::scope(|scope| {
        for seed in 0..num_clients {
            let num_compared = &num_compared;
            scope.spawn(move || {
                num_compared.fetch_add(client(server, known, seed, max_visits, end), Ordering::Relaxed);
            });
        }
    });
    let is_busy = || server.metric("cllm_running_answers", "") + server.metric("cllm_waiting_answers", "") > 0.0;
    while is_busy() {
        std::thread::yield_now();
    }
    num_compared.into_inner()
}

/// A request that is wrong in a random way.
fn malformed(random: &mut StdRng) -> (String, Vec<u8>) {
    let valid = json!({ "prompt": "Mia", "max_tokens": 5, "temperature": 0.5, "stop": ["x"], "n": 1 });
    let head = post_head(["/v1/completions", "/v1/chat/completions"][random.random_range(0..2)]);
    let wrong = [json!({}), json!("x"), json!(-1), json!([[]]), json!(1e300), json!([null]), json!(false)];
    match random.random_range(0..5) {
        0 => (head, (0..random.random_range(0..200)).map(|_| random.random()).collect()),
        1 => {
            let text = valid.to_string();
            (head, text.as_bytes()[..random.random_range(0..text.len())].to_vec())
        }
        2 => {
            let key = ["prompt", "max_tokens", "temperature", "stop", "n"][random.random_range(0..5)];
            let mut body = valid;
            let fits = |value: &Value| match key {
                "prompt" => value == "x",
                "stop" => value == "x",
                _ => false,
            };
            let wrong: Vec<&Value> = wrong.iter().filter(|value| !fits(value)).collect();
            body[key] = wrong[random.random_range(0..wrong.len())].clone();
            (post_head("/v1/completions"), body.to_string().into_bytes())
        }
        3 => {
            let mut body = valid;
            body[["logit_bias", "tools", "unknown", "messages"][random.random_range(0..4)]] = json!([1]);
            (post_head("/v1/completions"), body.to_string().into_bytes())
        }
        _ => {
            let method = ["GET", "PUT", "BREW", "DELETE"][random.random_range(0..4)];
            (format!("{method} /v1/completions{} HTTP/1.1", "x".repeat(random.random_range(0..50))), Vec::new())
        }
    }
}

fn send_malformed(server: &Server, number: usize) {
    let mut random = StdRng::seed_from_u64(1);
    for _ in 0..number {
        let (head, body) = malformed(&mut random);
        let response = server.send(&head, &body);
        let body = String::from_utf8_lossy(&body);
        assert!((400..500).contains(&response.status), "{head}, {body}: {} {}", response.status, response.body);
        let message = response.json()["error"]["message"].as_str().unwrap_or_default().to_owned();
        assert!(!message.is_empty(), "{head}, {body}: {}", response.body);
    }
    // What is not even HTTP.
    for text in ["\0\0\0\r\n\r\n", "POST / HTTP/9.9\r\n\r\n", "GET / HTTP/1.1\r\nHost\r\n\r\n"] {
        let mut stream = server.connect();
        std::io::Write::write_all(&mut stream, text.as_bytes()).unwrap();
        let status = read_response(stream).status;
        assert!(status == 0 || (400..500).contains(&status), "{text:?}: {status}");
    }
    assert_eq!(server.get("/health").status, 200);
}

#[test]
fn clients_that_come_and_go_get_the_answers_of_their_requests() {
    let server = Server::start(&SETTINGS);
    let known = known_requests(&server, 12);
    let num_compared = load(&server, &known, 8, 6, Duration::from_secs(600));
    assert!(num_compared >= 20, "{num_compared}");
    send_malformed(&server, 100);
    assert_eq!(text_of(&server.complete(known[0].body.clone())), known[0].text);
}

mod needs_time {
    use super::*;

    #[test]
    #[ignore = "takes two minutes: scripts/load-test"]
    fn nothing_is_lost_and_no_memory_leaks_in_two_minutes_of_64_clients() {
        let server = Server::start(&SETTINGS);
        let known = known_requests(&server, 40);
        let quarter = |_| (load(&server, &known, 64, usize::MAX, Duration::from_secs(30)), server.memory());
        let quarters: Vec<(u64, u64)> = (0..4).map(quarter).collect();
        println!("answers compared and bytes of memory after each half minute: {quarters:?}");
        let [.., (_, half), _, (_, end)] = quarters[..] else { unreachable!() };
        assert!(end < half + half / 20, "the memory grew from {half} to {end} bytes in the second half");
        send_malformed(&server, 1000);
        assert_eq!(text_of(&server.complete(known[0].body.clone())), known[0].text);
    }
}
