//! The page of a report in Chromium: its slider and its theme button.

use std::process::{Command, Stdio};

use serde_json::Value;

use crate::reports::{STORY, rendered_report};

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

#[test]
#[ignore = "needs chromium: scripts/test --browser"]
fn the_slider_shows_tokens_forward_by_forward_and_the_button_switches_the_theme() {
    let (dir, [_, page, ..]) = rendered_report();
    let listen =
        "<head>\n<script>window.errors = []; addEventListener('error', event => errors.push(event.message));</script>";
    let visited = page.replacen("<head>", listen, 1).replacen("</body>", VISITOR, 1);
    let file = dir.path().join("visited.html");
    std::fs::write(&file, visited).unwrap();
    let profile = format!("--user-data-dir={}", dir.path().join("browser").display());
    let address = format!("file://{}", file.display());
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
        &address,
    ];
    let output =
        Command::new("chromium").args(arguments).stderr(Stdio::null()).output().expect("chromium is not installed");
    let dom = String::from_utf8(output.stdout).unwrap();
    let written = dom
        .split_once("data-seen=\"")
        .and_then(|(_, rest)| rest.split_once('"'))
        .expect("the script recorded nothing")
        .0;
    let seen: Value = serde_json::from_str(
        &written.replace("&quot;", "\"").replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"),
    )
    .unwrap();
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
        assert_eq!(actual["shown"], format!("{value}.00 s"));
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
