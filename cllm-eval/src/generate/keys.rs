//! The chat's keys and commands: what a user can type besides a question.

use rustyline::DefaultEditor;
use rustyline::error::ReadlineError;

/// Every command, with its help. Ctrl-D and Ctrl-C are handled in [`read_input`] and in the chat's
/// answer loop.
const COMMANDS: [(&str, Input, &str); 3] = [
    ("/reset", Input::Reset, "forget the conversation and start over"),
    ("/help", Input::Help, "show this help"),
    ("/quit", Input::Quit, "end the chat (or Ctrl-D)"),
];

/// A line of input, or the key that ended it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Input {
    Question(String),
    Reset,
    Help,
    Quit,
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
    if line.is_empty() {
        return Input::Nothing;
    }
    let command = COMMANDS.iter().find(|(name, ..)| *name == line);
    command.map_or_else(|| Input::Question(line.to_owned()), |(_, input, _)| input.clone())
}

/// What /help shows.
pub(super) fn help() -> String {
    let commands: String = COMMANDS.iter().map(|(name, _, help)| format!("{name:<8}{help}\n")).collect();
    format!(
        "Every question is answered twice: on the left one token per forward, on the right by Jacobi decoding. The two\n\
         take turns; the answer whose forwards have taken less time so far runs the next one, so that both fill as fast\n\
         as they would alone. The conversation continues from the answer on the left; with --raw, every prompt is\n\
         answered on its own, without the chat template.\n\
         {commands}{:<8}stop the answer; twice: end the chat",
        "Ctrl-C"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_a_command_only_if_nothing_else_is_in_it() {
        assert_eq!(parse(""), Input::Nothing);
        assert_eq!(parse("/quit"), Input::Quit);
        assert_eq!(parse("/quit now"), Input::Question("/quit now".to_owned()));
        assert!(COMMANDS.iter().all(|(name, input, help)| parse(name) == *input && !help.is_empty()));
    }
}
