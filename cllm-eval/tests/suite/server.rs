//! A running server, and a client that speaks just enough HTTP.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::process::{Child, Command, Stdio};

use cllm_testing::programs::Program;
use serde_json::{Value, json};

pub const TEACHER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../configs/tiny-teacher");

/// A server in a process of its own, which ends with it.
pub struct Server {
    child: Child,
    pub address: String,
}

/// A response, with its body as it came.
pub struct Response {
    pub status: u16,
    pub head: String,
    pub body: String,
}

impl Response {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.body))
    }

    /// The objects of a stream of server-sent events, which has to end with `[DONE]`.
    #[track_caller]
    pub fn events(&self) -> Vec<Value> {
        assert!(self.status == 200 && self.head.contains("text/event-stream"), "{}", self.body);
        let data: Vec<&str> = self.body.lines().filter_map(|line| line.strip_prefix("data: ")).collect();
        assert_eq!(data.last(), Some(&"[DONE]"), "{}", self.body);
        data[..data.len() - 1].iter().map(|data| serde_json::from_str(data).unwrap()).collect()
    }
}

impl Server {
    /// Starts a server of the tiny teacher on a free port, and waits until it takes requests.
    pub fn start(settings: &[&str]) -> Self {
        Server::start_with(settings, |_| ())
    }

    pub fn start_with(settings: &[&str], change: impl FnOnce(&mut Command)) -> Self {
        let mut command = Program("cllm-eval").command(&[]);
        command.args(["serve", "port=0", "device=cpu", &format!("model={TEACHER}")]).args(settings);
        command.env_remove("CLLM_API_KEY").stdout(Stdio::piped()).stderr(Stdio::piped());
        change(&mut command);
        let mut child = command.spawn().unwrap();
        let mut url = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut url).unwrap();
        let address = url.trim().strip_prefix("http://").map(str::to_owned);
        let address = address.unwrap_or_else(|| panic!("{:?}", child.wait_with_output_text()));
        Server { child, address }
    }

    pub fn connect(&self) -> TcpStream {
        TcpStream::connect(&self.address).unwrap()
    }

    /// Sends a request and reads the response to its end.
    pub fn send(&self, head: &str, body: &[u8]) -> Response {
        let mut stream = self.connect();
        self.write_request(&mut stream, head, body);
        read_response(stream)
    }

    pub fn write_request(&self, stream: &mut TcpStream, head: &str, body: &[u8]) {
        let (address, length) = (&self.address, body.len());
        let head = format!("{head}\r\nHost: {address}\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n");
        // A server that refuses the head does not read the body.
        let _ = stream.write_all(&[head.as_bytes(), body].concat());
    }

    pub fn get(&self, path: &str) -> Response {
        self.send(&format!("GET {path} HTTP/1.1"), b"")
    }

    pub fn post(&self, path: &str, body: &Value) -> Response {
        self.send(&post_head(path), body.to_string().as_bytes())
    }

    pub fn complete(&self, body: Value) -> Response {
        self.post("/v1/completions", &body)
    }

    pub fn chat(&self, text: &str, more: Value) -> Response {
        let mut body = json!({ "messages": [{ "role": "user", "content": text }] });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        self.post("/v1/chat/completions", &body)
    }

    /// The value of a metric, summed over its labels that contain `label`.
    pub fn metric(&self, name: &str, label: &str) -> f64 {
        let text = self.get("/metrics").body;
        let lines = text.lines().filter(|line| line.starts_with(name) && line.contains(label));
        lines.map(|line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap()).sum()
    }

    pub fn signal(&self, name: &str) {
        let sent = Command::new("kill").args([&format!("-{name}"), &self.child.id().to_string()]).status();
        assert!(sent.unwrap().success());
    }

    /// Waits for the end of the process; its exit code, and what it said.
    pub fn wait(mut self) -> (Option<i32>, String) {
        let said = self.child.wait_with_output_text();
        (self.child.wait().unwrap().code(), said)
    }

    /// Memory in use, in bytes.
    pub fn memory(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.split_whitespace().next().unwrap().parse::<u64>().unwrap() * 1024
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

trait ErrorText {
    fn wait_with_output_text(&mut self) -> String;
}

impl ErrorText for Child {
    fn wait_with_output_text(&mut self) -> String {
        let mut text = String::new();
        let _ = self.stderr.take().unwrap().read_to_string(&mut text);
        text
    }
}

pub fn post_head(path: &str) -> String {
    format!("POST {path} HTTP/1.1\r\nContent-Type: application/json")
}

pub fn read_response(mut stream: TcpStream) -> Response {
    let mut bytes = Vec::new();
    // A server that refuses a request may close the connection before it has read all of it.
    let _ = stream.read_to_end(&mut bytes);
    let _ = stream.shutdown(Shutdown::Both);
    let text = String::from_utf8_lossy(&bytes).into_owned();
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0);
    let is_chunked = head.to_lowercase().contains("transfer-encoding: chunked");
    let body = if is_chunked { unchunked(body) } else { body.to_owned() };
    Response { status, head: head.to_lowercase(), body }
}

/// The body of a response in chunks; empty where a chunk is missing.
fn unchunked(mut rest: &str) -> String {
    let mut body = String::new();
    while let Some((size, after)) = rest.split_once("\r\n") {
        let Ok(size @ 1..) = usize::from_str_radix(size, 16) else { break };
        let Some(chunk) = after.get(..size) else { break };
        body.push_str(chunk);
        rest = after.get(size + 2..).unwrap_or_default();
    }
    body
}

/// The text of all parts of a choice.
pub fn streamed_text(events: &[Value], index: u64) -> String {
    let choices = events.iter().filter_map(|event| event["choices"].get(0));
    let of_index = choices.filter(|choice| choice["index"] == index);
    of_index.filter_map(|choice| choice["delta"]["content"].as_str().or(choice["text"].as_str())).collect()
}
