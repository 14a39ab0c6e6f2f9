//! The page of a report in a real browser, Debian's chromium: what its slider and its button do.

use std::process::{Command, Stdio};

use serde_json::Value;

use crate::reports::drawn;

/// Moves the slider and presses the button, and writes down what it sees.
const VISITOR: &str = r#"
<script>
const seen = { errors: window.errors, states: [] };
const range = document.querySelector(".example input");
for (const value of [0, 1, range.max]) {
  range.value = value;
  range.dispatchEvent(new Event("input"));
  const answers = [...document.querySelectorAll(".answers > div")];
  seen.states.push({
    fixed: answers.map(answer => answer.querySelectorAll("[data-forward]:not(.open)").length),
    tokens: answers.map(answer => answer.querySelector(".so-far").textContent),
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

#[test]
fn the_slider_fixes_tokens_forward_by_forward_and_the_button_turns_the_light() {
    if Command::new("chromium").arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status().is_err() {
        println!("skipped: chromium is not installed");
        return;
    }
    let (dir, [_, page, ..]) = drawn();
    let listen =
        "<head>\n<script>window.errors = []; addEventListener('error', event => errors.push(event.message));</script>";
    let visited = page.replacen("<head>", listen, 1).replacen("</body>", VISITOR, 1);
    let file = dir.path().join("visited.html");
    std::fs::write(&file, visited).unwrap();
    let profile = format!("--user-data-dir={}", dir.path().join("browser").display());
    let address = format!("file://{}", file.display());
    let arguments =
        ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=400,900", &profile, "--dump-dom", &address];
    let output = Command::new("chromium").args(arguments).stderr(Stdio::null()).output().unwrap();
    let dom = String::from_utf8(output.stdout).unwrap();
    let written =
        dom.split_once("data-seen=\"").and_then(|(_, rest)| rest.split_once('"')).expect("nothing was seen").0;
    let seen: Value = serde_json::from_str(
        &written.replace("&quot;", "\"").replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"),
    )
    .unwrap();
    assert_eq!(
        (&seen["errors"], &seen["loaded"], &seen["wider"]),
        (&serde_json::json!([]), &0.into(), &false.into()),
        "{seen}"
    );
    // Four answers of 8, 4, 8 and 2 forwards; the made-up text has one letter.
    let fixed = |state: usize| {
        seen["states"][state]["fixed"]
            .as_array()
            .unwrap()
            .iter()
            .map(|count| count.as_u64().unwrap())
            .collect::<Vec<_>>()
    };
    assert_eq!((fixed(0), fixed(1), fixed(2)), (vec![0; 4], vec![1; 4], vec![1; 4]), "{seen}");
    assert_eq!(seen["states"][0]["tokens"], serde_json::json!(["0", "0", "0", "0"]));
    assert_eq!(seen["states"][1]["tokens"], serde_json::json!(["1", "2", "1", "4"]));
    assert_eq!((&seen["states"][1]["shown"], &seen["states"][2]["shown"]), (&"1".into(), &"8".into()));
    assert_eq!(seen["states"][0]["text"], seen["states"][2]["text"], "no text moves");
    let papers = &seen["papers"];
    assert!(papers[0] != papers[1] && papers[0] == papers[2], "{papers}");
}
