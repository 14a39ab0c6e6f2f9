//! The page of a report in a real browser, Debian's chromium: what its slider and its button do.

use std::process::{Command, Stdio};

use serde_json::Value;

use crate::reports::{STORY, drawn};

/// Moves the slider and presses the button, and writes down what it sees.
const VISITOR: &str = r#"
<script>
const seen = { errors: window.errors, states: [] };
const range = document.querySelector(".example input");
const clear = "rgba(0, 0, 0, 0)";
for (const value of [0, 1, 4, range.max]) {
  range.value = value;
  range.dispatchEvent(new Event("input"));
  const answers = [...document.querySelectorAll(".answers > div")];
  seen.states.push({
    pieces: answers.map(answer => [...answer.querySelectorAll("[data-forward]")].map(piece => {
      const style = getComputedStyle(piece);
      return [piece.textContent, style.color !== clear, style.backgroundColor !== clear, style.backgroundColor];
    })),
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
    // Four answers of 8 tokens each; a piece is seen, and coloured unlike the one before it, from its forward on.
    for (state, (value, tokens)) in
        [(0, [0; 4]), (1, [1, 2, 1, 4]), (4, [4, 8, 4, 8]), (8, [8; 4])].into_iter().enumerate()
    {
        let found = &seen["states"][state];
        assert_eq!(found["shown"], value.to_string());
        assert_eq!(found["tokens"], serde_json::json!(tokens.map(|count: usize| count.to_string())), "{found}");
        assert_eq!(found["text"], serde_json::json!(vec![STORY; 4]), "no text moves");
        for (answer, forwards) in [8, 4, 8, 2].into_iter().enumerate() {
            let pieces: Vec<(String, bool, bool, String)> =
                serde_json::from_value(found["pieces"][answer].clone()).unwrap();
            assert_eq!(pieces.len(), forwards);
            let fixed: Vec<bool> = (0..forwards).map(|forward| forward < value).collect();
            assert_eq!(pieces.iter().map(|piece| piece.1).collect::<Vec<_>>(), fixed, "text after {value}");
            assert_eq!(pieces.iter().map(|piece| piece.2).collect::<Vec<_>>(), fixed, "colour after {value}");
            let shown = &pieces[..value.min(forwards)];
            assert!(shown.windows(2).all(|pair| pair[0].3 != pair[1].3), "{shown:?}");
            let text: String = shown.iter().map(|piece| piece.0.as_str()).collect();
            assert!(STORY.starts_with(&text) && (text == STORY) == (value >= forwards), "{text}");
        }
    }
    let papers = &seen["papers"];
    assert!(papers[0] != papers[1] && papers[0] == papers[2], "{papers}");
}
