//! `inspect`: shows one response's trajectory token by token, each compared with the fixed point.

use std::fmt::Write;
use std::path::PathBuf;

use clap::Args;
use clap::builder::RangedU64ValueParser;
use cllm_core::checkpoint::hub;
use cllm_core::printable::{shows_colour, to_printable};
use cllm_core::program::{Outcome, print_as_is, print_json};
use cllm_core::progress::count;
use cllm_core::tokenizer::Tokenizer;
use cllm_core::trajectory::{Block, FinishReason, Reader, Trajectory};
use cllm_core::{Error, Result, interrupt};
use serde::Serialize;
use serde_json::json;

#[derive(Args)]
pub(crate) struct Arguments {
    /// Folder of the data set, or one of its shards.
    data: PathBuf,
    /// The sample_id of the response to show [default: that of the first].
    #[arg(long, value_name = "ID", conflicts_with = "row")]
    sample: Option<String>,
    /// The number of the row to show, counted from 1.
    #[arg(long, value_name = "N", value_parser = RangedU64ValueParser::<usize>::new().range(1..))]
    row: Option<usize>,
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
    /// It is behind the end of the response.
    AfterEnd,
}

/// The status of each token of each state of a block, in a response of so many tokens.
fn token_statuses(block: &Block, num_tokens: usize) -> Vec<Vec<TokenStatus>> {
    let end = num_tokens.saturating_sub(block.start as usize);
    let Some(fixed_point) = block.states.last() else { return Vec::new() };
    let of_state = |state: &Vec<i32>| {
        let mut all_correct = true;
        let of_token = |(position, (token, final_token)): (usize, (&i32, &i32))| {
            if position >= end {
                return TokenStatus::AfterEnd;
            }
            let is_correct = token == final_token;
            all_correct &= is_correct;
            match (is_correct, all_correct) {
                (true, true) => TokenStatus::Final,
                (true, false) => TokenStatus::Early,
                (false, _) => TokenStatus::Wrong,
            }
        };
        state.iter().zip(fixed_point).enumerate().map(of_token).collect()
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
        print_as_is(&draw(&row, shows_colour(&std::io::stdout()), &text)?)?;
    }
    Ok(Outcome::Done)
}

fn load_tokenizer(reader: &Reader, model: Option<&str>) -> Result<Option<Tokenizer>> {
    let Some(model) = model else { return Ok(None) };
    let tokenizer = Tokenizer::load(&hub::locate(model)?)?;
    reader.check_tokenizer(tokenizer.fingerprint())?;
    Ok(Some(tokenizer))
}

fn find_row(reader: &Reader, arguments: &Arguments) -> Result<Trajectory> {
    for (index, row) in reader.rows().enumerate() {
        interrupt::check()?;
        let row = row?;
        let has_number = arguments.row.is_none_or(|number| number == index + 1);
        if has_number && arguments.sample.as_ref().is_none_or(|sample_id| *sample_id == row.sample_id) {
            return Ok(row);
        }
    }
    let message = match (&arguments.sample, arguments.row) {
        (Some(sample_id), _) => format!("has no row with the sample_id `{sample_id}`"),
        (None, Some(number)) => format!("has no row {number}: it has {}", count(reader.num_rows(), "row")),
        (None, None) => "has no rows".to_owned(),
    };
    Err(Error::file(&arguments.data, message))
}

fn print_as_json(row: &Trajectory, text: &impl Fn(i32) -> Result<String>) -> Result<()> {
    let mut blocks = Vec::new();
    for block in &row.blocks {
        let mut states = Vec::new();
        for (state, statuses) in block.states.iter().zip(token_statuses(block, row.response_ids.len())) {
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

/// Draws the prompt, the reference and the blocks of a response, one state per line. `+` marks early
/// tokens, `-` wrong ones and `·` those behind the end; an `a` after the state's number marks an
/// augmented state.
fn draw(row: &Trajectory, in_colour: bool, text: &impl Fn(i32) -> Result<String>) -> Result<String> {
    let legend = [
        (TokenStatus::Final, "final"),
        (TokenStatus::Early, "early"),
        (TokenStatus::Wrong, "wrong"),
        (TokenStatus::AfterEnd, "behind the end"),
    ];
    let legend = legend.map(|(status, name)| paint(name, status, in_colour)).join(", ");
    let mut drawing =
        format!("{} ({})\n\nprompt\n{}\n", one_line(&row.sample_id), one_line(&row.source), indent(&row.prompt));
    if let Some(reference) = &row.reference {
        let _ = write!(drawing, "\nreference\n{}\n", indent(reference));
    }
    let ended = if row.finish_reason == FinishReason::Eos { "ended by EOS" } else { "cut at the length limit" };
    let _ = write!(drawing, "\n{}, {ended}: {legend}\n", count(row.response_ids.len(), "token"));
    let forced = row.forced_tokens();
    for (block_index, block) in row.blocks.iter().enumerate() {
        if !forced.is_empty() && forced.end == block.start as usize {
            let _ = write!(drawing, "\nthe thought was closed at its limit, from token {}\n      ", forced.start);
            for &id in &row.response_ids[forced.clone()] {
                let _ = write!(drawing, " {}", one_line(&text(id)?));
            }
            drawing.push('\n');
        }
        let _ = write!(drawing, "\nblock {block_index}, from token {}\n", block.start);
        for (state_index, (state, statuses)) in
            block.states.iter().zip(token_statuses(block, row.response_ids.len())).enumerate()
        {
            let is_augmented = row.augmented.as_ref().is_some_and(|flags| flags[block_index][state_index]);
            let _ = write!(drawing, "{state_index:>4}{}", if is_augmented { "a " } else { "  " });
            for (&id, status) in state.iter().zip(statuses) {
                let _ = write!(drawing, " {}", paint(&one_line(&text(id)?), status, in_colour));
            }
            drawing.push('\n');
        }
    }
    Ok(drawing.trim_end().to_owned())
}

/// A token with its mark, which tells the statuses apart where colours do not.
fn paint(token: &str, status: TokenStatus, in_colour: bool) -> String {
    let (mark, colour) = match status {
        TokenStatus::Final => ("", "\x1b[32m"),
        TokenStatus::Early => ("+", "\x1b[36m"),
        TokenStatus::Wrong => ("-", "\x1b[31m"),
        TokenStatus::AfterEnd => ("·", "\x1b[2m"),
    };
    if in_colour { format!("{colour}{mark}{token}\x1b[0m") } else { format!("{mark}{token}") }
}

/// A text in lines of its own, without control characters.
fn indent(text: &str) -> String {
    text.lines().map(|line| format!("    {}", one_line(line))).collect::<Vec<_>>().join("\n")
}

/// Shows control characters, so that a token neither breaks the line nor sends the terminal a command.
fn one_line(token: &str) -> String {
    to_printable(&token.replace('\n', "\\n").replace('\r', "\\r").replace('\t', "\\t"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_final_early_or_wrong() {
        let block = Block { start: 0, states: vec![vec![1, 9, 3], vec![1, 2, 3]] };
        let expected = [[TokenStatus::Final, TokenStatus::Wrong, TokenStatus::Early], [TokenStatus::Final; 3]];
        assert_eq!(token_statuses(&block, 3), expected.map(|state| state.to_vec()));
        let cut = token_statuses(&block, 2);
        assert!(cut.iter().all(|state| state[2] == TokenStatus::AfterEnd), "{cut:?}");
        assert_eq!(one_line("a\x1b\n"), "a␛\\n");
    }
}
