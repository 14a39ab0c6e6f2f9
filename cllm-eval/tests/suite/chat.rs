//! The chat of `generate`, in a pseudo-terminal created by `script` (Debian's bsdutils).

use std::io::Write;
use std::process::{Command, Stdio};

use crate::made_up::model;

/// The exit code and the screen of a chat with the tiny teacher in which these lines were typed.
fn session(typed: &str) -> (i32, String) {
    let program = env!("CARGO_BIN_EXE_cllm-eval");
    let teacher = concat!(env!("CARGO_MANIFEST_DIR"), "/../configs/tiny-teacher");
    let command = format!("stty cols 90; {program} generate --model {teacher} --device cpu --n 4 --max-new-tokens 24");
    let mut script = Command::new("script")
        .args(["-qec", &command, "/dev/null"])
        .env("NO_COLOR", "1")
        // A terminal without control sequences, which reads lines as they are typed.
        .env("TERM", "dumb")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("`script` of bsdutils is not installed");
    script.stdin.take().unwrap().write_all(typed.as_bytes()).unwrap();
    let output = script.wait_with_output().unwrap();
    let shown = String::from_utf8_lossy(&output.stdout).into_owned();
    (output.status.code().unwrap(), console::strip_ansi_codes(&shown).into_owned())
}

/// The lines of each answer in the left column, from the last frame before its summary.
fn answers(shown: &str) -> Vec<Vec<String>> {
    let mut answers = Vec::new();
    let mut frame = Vec::new();
    for line in shown.lines() {
        match line.split_once(" │ ") {
            Some((left, _)) if left.trim_start_matches(['>', ' ', '\r']).trim_end() == "ar" => frame.clear(),
            Some((left, _)) => frame.push(left.trim_end().to_owned()),
            None if line.contains("tokens; rolling is") => {
                frame.pop();
                answers.push(std::mem::take(&mut frame));
            }
            None => {}
        }
    }
    answers
}

#[test]
fn a_question_continues_the_conversation_until_it_is_reset() {
    let typed = "Tom has 3 apples.\nTom has 3 apples.\n/reset\nTom has 3 apples.\n/help\n/quti\n/exit\n";
    let (code, shown) = session(typed);
    assert_eq!(code, 0, "{shown}");
    let answers = answers(&shown);
    assert_eq!(answers.len(), 3, "{shown}");
    assert!(answers.iter().all(|lines| !lines.concat().is_empty()), "{answers:?}");
    assert!(answers[0] == answers[2] && answers[0] != answers[1], "{answers:?}");
    assert!(shown.contains("same tokens") && !shown.contains("different tokens"), "{shown}");
    assert!(shown.contains(" per forward") && shown.contains("forget the conversation and start over"), "{shown}");
}

#[test]
fn commands_change_the_strategy_and_trim_the_conversation() {
    let long = "Tom has 3 apples. ".repeat(100);
    let typed =
        format!("/strategy {{jacobi: {{n: 8}}}}\nTom has 3 apples.\n/strategy roling\n{long}\n/trim\n/quti\n/exit\n");
    let (code, shown) = session(&typed);
    assert_eq!(code, 0, "{shown}");
    for part in [
        "jacobi n=8, greedy",
        "tokens; jacobi is",
        "did you mean `rolling`",
        "/trim forgets the oldest question",
        "the conversation is empty",
        "there is no command /quti; did you mean `/quit`",
    ] {
        assert!(shown.contains(part), "{part}: {shown}");
    }
}

#[test]
fn without_a_terminal_a_prompt_is_required() {
    let dir = tempfile::tempdir().unwrap();
    model(dir.path(), 5);
    for (arguments, expected) in [
        (&[][..], "needs a terminal"),
        (&["--json"][..], "--json needs a prompt"),
        (&["--max-new-tokens", "99999", "hi"][..], "--max-new-tokens 99999 leaves no room"),
    ] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_cllm-eval"));
        command.args(["generate", "--model"]).arg(dir.path()).args(arguments);
        let output = command.stdin(Stdio::null()).output().unwrap();
        let message = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.code() == Some(2) && message.contains(expected), "{message}");
    }
}
