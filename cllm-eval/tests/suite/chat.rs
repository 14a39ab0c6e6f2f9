//! The chat of `generate`, in a pseudo terminal that `script` (util-linux) makes.

use std::io::Write;
use std::process::{Command, Stdio};

use crate::made_up::model;

/// What the terminal showed of a chat with the tiny teacher in which these lines were typed.
fn session(typed: &str) -> Option<(i32, String)> {
    let program = env!("CARGO_BIN_EXE_cllm-eval");
    let teacher = concat!(env!("CARGO_MANIFEST_DIR"), "/../configs/tiny-teacher");
    let command = format!("stty cols 90; {program} generate --model {teacher} --device cpu --n 4 --max-new-tokens 24");
    let started = Command::new("script")
        .args(["-qec", &command, "/dev/null"])
        .env("NO_COLOR", "1")
        // A terminal without commands, whose lines are read as they are typed.
        .env("TERM", "dumb")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn();
    let Ok(mut script) = started else {
        println!("skipped: `script` is not installed");
        return None;
    };
    script.stdin.take().unwrap().write_all(typed.as_bytes()).unwrap();
    let output = script.wait_with_output().unwrap();
    let shown = String::from_utf8_lossy(&output.stdout).into_owned();
    Some((output.status.code().unwrap(), console::strip_ansi_codes(&shown).into_owned()))
}

/// The text of each answer's left column, from the last picture before its summary.
fn answers(shown: &str) -> Vec<Vec<String>> {
    let mut found = Vec::new();
    let mut picture = Vec::new();
    for line in shown.lines() {
        match line.split_once(" │ ") {
            Some((left, _)) if left.trim_start_matches("> ").trim_end() == "ar" => picture.clear(),
            Some((left, _)) => picture.push(left.trim_end().to_owned()),
            None if line.starts_with("on the right") => {
                picture.pop();
                found.push(std::mem::take(&mut picture));
            }
            None => {}
        }
    }
    found
}

#[test]
fn a_question_is_asked_with_all_that_was_said_until_that_is_forgotten() {
    let typed = "Tom has 3 apples.\nTom has 3 apples.\n/reset\nTom has 3 apples.\n/help\n/quit\n";
    let Some((code, shown)) = session(typed) else { return };
    assert_eq!(code, 0, "{shown}");
    let found = answers(&shown);
    assert_eq!(found.len(), 3, "{shown}");
    assert!(found.iter().all(|lines| !lines.concat().is_empty()), "{found:?}");
    assert!(found[0] == found[2] && found[0] != found[1], "{found:?}");
    assert!(shown.contains("the same tokens") && !shown.contains("other tokens"), "{shown}");
    assert!(shown.contains(" a forward") && shown.contains("/reset forgets"), "{shown}");
}

#[test]
fn without_a_terminal_a_prompt_is_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    model(dir.path(), 5);
    for (more, said) in [
        (&[][..], "needs a terminal"),
        (&["--json"][..], "--json needs a prompt"),
        (&["--max-new-tokens", "99999", "hi"][..], "--max-new-tokens 99999: with"),
    ] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_cllm-eval"));
        command.args(["generate", "--model"]).arg(dir.path()).args(more);
        let output = command.stdin(Stdio::null()).output().unwrap();
        let message = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.code() == Some(2) && message.contains(said), "{message}");
    }
}
