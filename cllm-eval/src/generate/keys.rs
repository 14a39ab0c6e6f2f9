//! The chat's keys and commands: what a user can type besides a question.

use cllm_core::settings::did_you_mean;
use rustyline::DefaultEditor;
use rustyline::error::ReadlineError;

/// Every command with what it takes, and its help. Ctrl-D and Ctrl-C are handled in [`read_input`]
/// and in the chat's answer loop.
const COMMANDS: [(&str, &str, &str); 8] = [
    ("/strategy", "NAME", "decode the right answer with jacobi, {rolling: {n: 32}} ..."),
    ("/temperature", "T", "choose tokens at this temperature; 0 takes the likeliest"),
    ("/seed", "N", "choose and draft tokens from this seed"),
    ("/reset", "", "forget the conversation and start over"),
    ("/trim", "", "forget the oldest question and its answer"),
    ("/help", "", "show this help"),
    ("/quit", "", "end the chat (or Ctrl-D)"),
    ("/exit", "", "end the chat"),
];

/// A line of input, or the key that ended it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Input {
    Question(String),
    /// The text of a strategy; empty to ask which it is.
    Strategy(String),
    Temperature(String),
    Seed(String),
    Reset,
    Trim,
    Help,
    Quit,
    /// A line that begins like a command, and what is wrong with it.
    Unknown(String),
    /// An empty line, or Ctrl-C while there is no answer to stop.
    Nothing,
}

/// Reads one line.
pub(super) fn read_input(editor: &mut DefaultEditor) -> Result<Input, ReadlineError> {
    match editor.readline("> ") {
        Ok(line) => Ok(parse(line.trim())),
        Err(ReadlineError::Interrupted) => Ok(Input::Nothing),
        Err(ReadlineError::Eof) => Ok(Input::Quit),
        Err(error) => Err(error),
    }
}

fn parse(line: &str) -> Input {
    let (word, rest) = line.split_once(' ').map_or((line, ""), |(word, rest)| (word, rest.trim()));
    match (word, rest) {
        ("", _) => Input::Nothing,
        ("/strategy", name) => Input::Strategy(name.to_owned()),
        ("/temperature", value) => Input::Temperature(value.to_owned()),
        ("/seed", value) => Input::Seed(value.to_owned()),
        ("/reset", "") => Input::Reset,
        ("/trim", "") => Input::Trim,
        ("/help", "") => Input::Help,
        ("/quit" | "/exit", "") => Input::Quit,
        _ if looks_like_command(word) => Input::Unknown(unknown(word)),
        _ => Input::Question(line.to_owned()),
    }
}

/// A slash and a word; a path such as `/etc/hosts` is part of a question.
fn looks_like_command(word: &str) -> bool {
    word.strip_prefix('/').is_some_and(|name| !name.is_empty() && name.chars().all(|c| c.is_ascii_alphabetic()))
}

fn unknown(word: &str) -> String {
    let names: Vec<String> = COMMANDS.iter().map(|(name, ..)| (*name).to_owned()).collect();
    match names.iter().any(|name| name == word) {
        true => format!("{word} takes nothing else; /help lists the commands"),
        false => format!("there is no command {word}{}; /help lists the commands", did_you_mean(word, &names)),
    }
}

/// What /help shows.
pub(super) fn help() -> String {
    let commands: String =
        COMMANDS.iter().map(|(name, takes, help)| format!("{:<17}{help}\n", format!("{name} {takes}"))).collect();
    format!(
        "Every question is answered twice: on the left one token per forward, on the\n\
         right with drafts. The two take turns; the answer whose forwards have taken\n\
         less time so far runs the next one, so that both fill as fast as they would\n\
         alone. The conversation continues from the answer on the left; with --raw,\n\
         every prompt is answered on its own, without the chat template.\n\
         {commands}{:<17}stop the answer; twice: end the chat",
        "Ctrl-C"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_a_command_a_question_or_a_mistake_that_is_named() {
        assert_eq!(parse(""), Input::Nothing);
        assert_eq!([parse("/quit"), parse("/exit")], [Input::Quit, Input::Quit]);
        assert_eq!(parse("/strategy {jacobi: {n: 4}}"), Input::Strategy("{jacobi: {n: 4}}".to_owned()));
        assert_eq!(parse("/temperature 0.7"), Input::Temperature("0.7".to_owned()));
        assert_eq!(parse("/seed 7"), Input::Seed("7".to_owned()));
        for (line, part) in [("/quti", "did you mean `/quit`"), ("/reset all", "takes nothing else")] {
            assert!(matches!(parse(line), Input::Unknown(message) if message.contains(part)), "{line}");
        }
        for question in ["what is /quit", "/etc/hosts", "1/2"] {
            assert_eq!(parse(question), Input::Question(question.to_owned()));
        }
        assert!(help().lines().all(|line| line.len() <= 80), "{}", help());
    }
}
