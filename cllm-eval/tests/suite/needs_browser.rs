//! Pages in Chromium: a report's slider and theme button, and the page of a server.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Arc, Barrier};

use serde_json::{Value, json};

use crate::reports::{STORY, rendered_report};
use crate::server::Server;

/// Moves the slider, presses the button, and records what is visible.
const VISITOR: &str = r#"
<script>
const seen = { errors: window.errors, states: [] };
const range = document.querySelector(".example input");
const clear = "rgba(0, 0, 0, 0)";
for (const value of [0, 125, 500, range.max]) {
  range.value = value;
  range.dispatchEvent(new Event("input"));
  const answers = [...document.querySelectorAll(".answers > div")];
  seen.states.push({
    forwards: answers.map(answer => [...answer.querySelectorAll("[data-forward]")].map(span => {
      const style = getComputedStyle(span);
      return [span.textContent, style.color !== clear, style.backgroundColor !== clear, style.backgroundColor];
    })),
    tokens: answers.map(answer => answer.querySelector(".num-shown").textContent),
    text: answers.map(answer => answer.querySelector(".answer").textContent),
    shown: document.querySelector("output").value,
  });
}
const paper = () => getComputedStyle(document.body).backgroundColor;
const before = paper();
document.getElementById("theme").click();
seen.papers = [before, paper()];
document.getElementById("theme").click();
seen.papers.push(paper());
seen.loaded = performance.getEntriesByType("resource").length;
seen.wider = document.documentElement.scrollWidth > document.documentElement.clientWidth;
document.documentElement.dataset.seen = JSON.stringify(seen);
</script>
</body>"#;

/// Opens a page in Chromium, and returns what its visitor wrote into `data-seen` before the page was
/// loaded.
fn seen_by_visitor(address: &str, folder: &Path) -> Value {
    let profile = format!("--user-data-dir={}", folder.join("browser").display());
    // Without the last three, Chromium connects to its update servers.
    let arguments = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--window-size=400,900",
        &profile,
        "--dump-dom",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        address,
    ];
    let output =
        Command::new("chromium").args(arguments).stderr(Stdio::null()).output().expect("chromium is not installed");
    let dom = String::from_utf8(output.stdout).unwrap();
    let written = dom.split_once("data-seen=\"").and_then(|(_, rest)| rest.split_once('"'));
    let written = written.unwrap_or_else(|| panic!("the script recorded nothing: {dom}")).0;
    let json = written.replace("&quot;", "\"").replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&");
    serde_json::from_str(&json).unwrap()
}

#[test]
#[ignore = "needs chromium: scripts/test --browser"]
fn the_slider_shows_tokens_forward_by_forward_and_the_button_switches_the_theme() {
    let (dir, [_, page, ..]) = rendered_report();
    let listen =
        "<head>\n<script>window.errors = []; addEventListener('error', event => errors.push(event.message));</script>";
    let visited = page.replacen("<head>", listen, 1).replacen("</body>", VISITOR, 1);
    let file = dir.path().join("visited.html");
    std::fs::write(&file, visited).unwrap();
    let seen = seen_by_visitor(&format!("file://{}", file.display()), dir.path());
    assert_eq!(
        (&seen["errors"], &seen["loaded"], &seen["wider"]),
        (&serde_json::json!([]), &0.into(), &false.into()),
        "{seen}"
    );
    // Four answers of 8 tokens each. Once its forward is reached, a text is visible and coloured
    // unlike the one before it.
    // Every forward took a second.
    for (state, (value, tokens)) in
        [(0, [0; 4]), (1, [1, 2, 1, 4]), (4, [4, 8, 4, 8]), (8, [8; 4])].into_iter().enumerate()
    {
        let actual = &seen["states"][state];
        // The dumped page escapes the space, which does not break.
        assert_eq!(actual["shown"], format!("{value}.00&nbsp;s"));
        assert_eq!(actual["tokens"], serde_json::json!(tokens.map(|count: usize| count.to_string())), "{actual}");
        assert_eq!(actual["text"], serde_json::json!(vec![STORY; 4]), "text is hidden, not removed");
        for (answer, forwards) in [8, 4, 8, 2].into_iter().enumerate() {
            let texts: Vec<(String, bool, bool, String)> =
                serde_json::from_value(actual["forwards"][answer].clone()).unwrap();
            assert_eq!(texts.len(), forwards);
            let visible: Vec<bool> = (0..forwards).map(|forward| forward < value).collect();
            assert_eq!(texts.iter().map(|text| text.1).collect::<Vec<_>>(), visible, "text after {value}");
            assert_eq!(texts.iter().map(|text| text.2).collect::<Vec<_>>(), visible, "colour after {value}");
            let shown = &texts[..value.min(forwards)];
            assert!(shown.windows(2).all(|pair| pair[0].3 != pair[1].3), "{shown:?}");
            let text: String = shown.iter().map(|text| text.0.as_str()).collect();
            assert!(STORY.starts_with(&text) && (text == STORY) == (value >= forwards), "{text}");
        }
    }
    let papers = &seen["papers"];
    assert!(papers[0] != papers[1] && papers[0] == papers[2], "{papers}");
}

/// Waits for the models, decodes the prompt by the keyboard, and records what is shown.
const SERVE_VISITOR: &str = r#"
<script>
const errors = [];
addEventListener("error", event => errors.push(event.message));
const until = async test => { while (!test()) await new Promise(done => setTimeout(done, 20)); };
(async () => {
  const columns = document.getElementById("columns"), status = document.getElementById("status");
  await until(() => columns.children.length === 2);
  document.dispatchEvent(new KeyboardEvent("keydown", { key: "Enter", ctrlKey: true }));
  await until(() => /text|error/i.test(status.textContent) || status.className === "error");
  const of = (column, name) => column.querySelector("." + name).textContent;
  const seen = [...columns.children].map(column => ({
    strategy: of(column, "strategy"), tokens: +of(column, "tokens"), perForward: +of(column, "per-forward"),
    answer: of(column, "answer"), verdict: of(column, "verdict"), label: column.querySelector(".answer").ariaLabel,
    colours: new Set([...column.querySelectorAll(".answer span")].map(span => getComputedStyle(span).backgroundColor)).size,
    markup: column.querySelectorAll(".answer :not(span)").length,
  }));
  const paper = () => getComputedStyle(document.body).backgroundColor;
  const papers = [0, 1, 2].map(() => { document.getElementById("theme").click(); return paper(); });
  const wider = document.documentElement.scrollWidth > document.documentElement.clientWidth;
  document.documentElement.dataset.seen = JSON.stringify({ errors, status: status.textContent, seen, papers, wider });
  fetch("/done");
})();
</script>
<img src="/held" alt="">
</body>"#;

/// Serves the page of a server with a visitor in it, without the policy that forbids one, and hands
/// everything else on. The page is loaded once the visitor is done. Returns its address.
fn visited_page(server: &Server) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let (address, upstream) = (listener.local_addr().unwrap().to_string(), server.address.clone());
    let page = server.get("/").body.replacen("</body>", SERVE_VISITOR, 1);
    let both = Arc::new(Barrier::new(2));
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let (mut stream, upstream, page, both) =
                (stream.unwrap(), upstream.clone(), page.clone(), Arc::clone(&both));
            std::thread::spawn(move || {
                let head = read_head(&mut stream);
                let is_page = head.starts_with("GET / ");
                if is_page || head.starts_with("GET /held ") || head.starts_with("GET /done ") {
                    if !is_page {
                        both.wait();
                    }
                    let head = "HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nConnection: close\r\n\r\n";
                    let _ = stream.write_all((head.to_owned() + if is_page { &page } else { "" }).as_bytes());
                    return;
                }
                let mut server = TcpStream::connect(upstream).unwrap();
                // The next request on this connection may not be for the server.
                server.write_all(head.replace("keep-alive", "close").as_bytes()).unwrap();
                let (mut from, mut to) = (stream.try_clone().unwrap(), server.try_clone().unwrap());
                std::thread::spawn(move || std::io::copy(&mut from, &mut to));
                let _ = std::io::copy(&mut server, &mut stream);
            });
        }
    });
    address
}

/// The head of a request.
fn read_head(stream: &mut TcpStream) -> String {
    let (mut head, mut byte) = (Vec::new(), [0]);
    while !head.ends_with(b"\r\n\r\n") && stream.read(&mut byte).is_ok_and(|read| read == 1) {
        head.push(byte[0]);
    }
    String::from_utf8(head).unwrap()
}

#[test]
#[ignore = "needs chromium: scripts/test --browser"]
fn the_page_of_a_server_decodes_with_both_models_side_by_side() {
    let server = Server::start(&["strategy={jacobi: {n: 8}}"]);
    let dir = tempfile::tempdir().unwrap();
    let seen = seen_by_visitor(&format!("http://{}/", visited_page(&server)), dir.path());
    assert_eq!((&seen["errors"], &seen["wider"]), (&json!([]), &json!(false)), "{seen}");
    let [left, right] = &seen["seen"].as_array().unwrap()[..] else { panic!("{seen}") };
    assert_eq!((left["strategy"].as_str(), right["strategy"].as_str()), (Some("ar"), Some("jacobi n=8")));
    assert!(left["answer"] == right["answer"] && left["tokens"] == right["tokens"], "{seen}");
    assert!(
        left["answer"].as_str().unwrap().len() > 10 && left["label"].as_str().unwrap().contains("Answer of"),
        "{seen}"
    );
    assert!(left["perForward"] == 1.0 && right["perForward"].as_f64().unwrap() > 1.0, "{seen}");
    assert!(left["colours"] == 1 && right["colours"].as_u64().unwrap() > 1, "{seen}");
    assert!(left["markup"] == 0 && right["markup"] == 0, "{seen}");
    let verdicts = [&left["verdict"], &right["verdict"]].map(|verdict| verdict.as_str().unwrap());
    assert!(verdicts.contains(&"first") && verdicts.iter().any(|verdict| verdict.contains("× as long")), "{seen}");
    assert!(seen["status"].as_str().unwrap().ends_with("same text"), "{seen}");
    assert_ne!(seen["papers"][0], seen["papers"][1]);
}
