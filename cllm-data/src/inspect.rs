//! `inspect`: shows one response's trajectory token by token, each compared with the fixed point.

use std::fmt::Write;
use std::io::IsTerminal;
use std::path::PathBuf;

use clap::Args;
use cllm_core::checkpoint::hub;
use cllm_core::program::{Outcome, print, print_json};
use cllm_core::tokenizer::Tokenizer;
use cllm_core::trajectory::{Block, Reader, Trajectory};
use cllm_core::{Error, Result, interrupt};
use serde::Serialize;
use serde_json::json;

#[derive(Args)]
pub(crate) struct Arguments {
    /// Folder of the data set, or one of its shards.
    data: PathBuf,
    /// The sample_id of the response to show [default: that of the first].
    #[arg(long, value_name = "ID")]
    sample: Option<String>,
    /// The model whose tokenizer decodes the tokens (a folder or an id); without it, show token
    /// ids.
    #[arg(long)]
    model: Option<String>,
    /// Print the result as one JSON document on stdout.
    #[arg(long)]
    json: bool,
}

/// How a token of a state compares with the fixed point.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum TokenStatus {
    /// It and all tokens before it are correct.
    Final,
    /// It is correct, but a token before it is wrong.
    Early,
    Wrong,
}

/// The status of each token of each state of a block.
fn token_statuses(block: &Block) -> Vec<Vec<TokenStatus>> {
    let Some(fixed_point) = block.states.last() else { return Vec::new() };
    let of_state = |state: &Vec<i32>| {
        let mut all_correct = true;
        let of_token = |(token, final_token): (&i32, &i32)| {
            let is_correct = token == final_token;
            all_correct &= is_correct;
            match (is_correct, all_correct) {
                (true, true) => TokenStatus::Final,
                (true, false) => TokenStatus::Early,
                (false, _) => TokenStatus::Wrong,
            }
        };
        state.iter().zip(fixed_point).map(of_token).collect()
    };
    block.states.iter().map(of_state).collect()
}

/// Shows one response.
///
/// # Errors
/// When the data set cannot be read, or has no row with the sample_id.
pub(crate) fn run(arguments: &Arguments) -> Result<Outcome> {
    let reader = Reader::open_incomplete(&arguments.data)?;
    let row = find_row(&reader, arguments)?;
    let tokenizer = load_tokenizer(&reader, arguments.model.as_deref())?;
    let text = |id: i32| match &tokenizer {
        // The token after itself: what it looks like amid a text, with its leading blank.
        Some(tokenizer) => {
            tokenizer.decode_answer(&[id], &[id]).map(|text| if text.is_empty() { format!("<{id}>") } else { text })
        }
        None => Ok(id.to_string()),
    };
    if arguments.json {
        print_as_json(&row, &text)?;
    } else {
        print(&draw(&row, stdout_shows_colour(), &text)?)?;
    }
    Ok(Outcome::Done)
}

fn stdout_shows_colour() -> bool {
    std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

fn load_tokenizer(reader: &Reader, model: Option<&str>) -> Result<Option<Tokenizer>> {
    let Some(model) = model else { return Ok(None) };
    let tokenizer = Tokenizer::load(&hub::locate(model)?)?;
    reader.check_tokenizer(tokenizer.fingerprint())?;
    Ok(Some(tokenizer))
}

fn find_row(reader: &Reader, arguments: &Arguments) -> Result<Trajectory> {
    for row in reader.rows() {
        interrupt::check()?;
        let row = row?;
        if arguments.sample.as_ref().is_none_or(|sample_id| *sample_id == row.sample_id) {
            return Ok(row);
        }
    }
    let message = match &arguments.sample {
        Some(sample_id) => format!("has no row with the sample_id `{sample_id}`"),
        None => "has no rows".to_owned(),
    };
    Err(Error::file(&arguments.data, message))
}

fn print_as_json(row: &Trajectory, text: &impl Fn(i32) -> Result<String>) -> Result<()> {
    let mut blocks = Vec::new();
    for block in &row.blocks {
        let mut states = Vec::new();
        for (state, statuses) in block.states.iter().zip(token_statuses(block)) {
            let texts = state.iter().map(|&id| text(id)).collect::<Result<Vec<_>>>()?;
            states.push(json!({ "ids": state, "texts": texts, "statuses": statuses }));
        }
        blocks.push(json!({ "start": block.start, "states": states }));
    }
    print_json(&json!({
        "schema_version": 1,
        "sample_id": row.sample_id,
        "source": row.source,
        "prompt": row.prompt,
        "reference": row.reference,
        "finish_reason": row.finish_reason,
        "response_ids": row.response_ids,
        "augmented": row.augmented,
        "forced": (!row.forced_tokens().is_empty()).then(|| row.forced_tokens()),
        "blocks": blocks,
    }))
}

/// Draws the blocks of a response, one state per line. Without colour, `+` marks early tokens and
/// `-` wrong ones; an `a` after the state's number marks an augmented state.
fn draw(row: &Trajectory, in_colour: bool, text: &impl Fn(i32) -> Result<String>) -> Result<String> {
    let legend = [(TokenStatus::Final, "final"), (TokenStatus::Early, "early"), (TokenStatus::Wrong, "wrong")]
        .map(|(status, name)| paint(name, status, in_colour))
        .join(", ");
    let mut drawing = format!("{} ({}): {legend}\n", row.sample_id, row.source);
    let forced = row.forced_tokens();
    for (block_index, block) in row.blocks.iter().enumerate() {
        if !forced.is_empty() && forced.end == block.start as usize {
            let _ = write!(drawing, "\nthe thought was closed at its limit, from token {}\n      ", forced.start);
            for &id in &row.response_ids[forced.clone()] {
                let _ = write!(drawing, " {}", escape_controls(&text(id)?));
            }
            drawing.push('\n');
        }
        let _ = write!(drawing, "\nblock {block_index}, from token {}\n", block.start);
        for (state_index, (state, statuses)) in block.states.iter().zip(token_statuses(block)).enumerate() {
            let is_augmented = row.augmented.as_ref().is_some_and(|flags| flags[block_index][state_index]);
            let _ = write!(drawing, "{state_index:>4}{}", if is_augmented { "a " } else { "  " });
            for (&id, status) in state.iter().zip(statuses) {
                let _ = write!(drawing, " {}", paint(&escape_controls(&text(id)?), status, in_colour));
            }
            drawing.push('\n');
        }
    }
    Ok(drawing.trim_end().to_owned())
}

fn paint(token: &str, status: TokenStatus, in_colour: bool) -> String {
    match (in_colour, status) {
        (true, TokenStatus::Final) => format!("\x1b[32m{token}\x1b[0m"),
        (true, TokenStatus::Early) => format!("\x1b[36m{token}\x1b[0m"),
        (true, TokenStatus::Wrong) => format!("\x1b[31m{token}\x1b[0m"),
        (false, TokenStatus::Final) => token.to_owned(),
        (false, TokenStatus::Early) => format!("+{token}"),
        (false, TokenStatus::Wrong) => format!("-{token}"),
    }
}

/// Escapes control characters, so that a token neither breaks the line nor sends the terminal a
/// command.
fn escape_controls(token: &str) -> String {
    let mut escaped = String::new();
    for character in token.chars() {
        if character.is_control() {
            escaped.extend(character.escape_default());
        } else {
            escaped.push(character);
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_final_early_or_wrong() {
        let block = Block { start: 0, states: vec![vec![1, 9, 3], vec![1, 2, 3]] };
        let expected = [[TokenStatus::Final, TokenStatus::Wrong, TokenStatus::Early], [TokenStatus::Final; 3]];
        assert_eq!(token_statuses(&block), expected.map(|state| state.to_vec()));
        assert_eq!(escape_controls("a\x1b"), "a\\u{1b}");
    }
}
