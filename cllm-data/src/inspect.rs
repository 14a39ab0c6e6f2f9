//! `inspect`: one response's trajectory, token by token: final, right early, or wrong.

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

/// Command line of `inspect`.
#[derive(Args)]
pub struct Arguments {
    /// The data set.
    data: PathBuf,
    /// The response with this sample id; without it, the first.
    #[arg(long)]
    sample: Option<String>,
    /// The model whose tokenizer shows text instead of ids: a folder or an id.
    #[arg(long)]
    model: Option<String>,
    /// Print it as JSON on stdout.
    #[arg(long)]
    json: bool,
}

/// What a token of a state is, compared with the fixed point.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Standing {
    /// It and all before it are right.
    Final,
    /// Right, after a wrong one.
    Early,
    /// Wrong.
    Wrong,
}

/// The standing of each token of each state of a block.
pub fn standings(block: &Block) -> Vec<Vec<Standing>> {
    let Some(fixed_point) = block.states.last() else { return Vec::new() };
    let of_state = |state: &Vec<i32>| {
        let mut all_right = true;
        let of_token = |(token, right): (&i32, &i32)| {
            all_right &= token == right;
            match (token == right, all_right) {
                (true, true) => Standing::Final,
                (true, false) => Standing::Early,
                (false, _) => Standing::Wrong,
            }
        };
        state.iter().zip(fixed_point).map(of_token).collect()
    };
    block.states.iter().map(of_state).collect()
}

/// Shows one response.
///
/// # Errors
/// Bad data sets, and a sample id that none has.
pub fn run(arguments: &Arguments) -> Result<Outcome> {
    let reader = Reader::open_incomplete(&arguments.data)?;
    let row = find(&reader, arguments)?;
    let tokenizer = match &arguments.model {
        Some(model) => {
            let tokenizer = Tokenizer::load(&hub::locate(model)?)?;
            reader.check_tokenizer(tokenizer.fingerprint())?;
            Some(tokenizer)
        }
        None => None,
    };
    let text = |id: i32| match &tokenizer {
        Some(tokenizer) => tokenizer.decode(&[id]).map(|text| if text.is_empty() { format!("<{id}>") } else { text }),
        None => Ok(id.to_string()),
    };
    if arguments.json {
        return as_json(&row, &text).map(|()| Outcome::Done);
    }
    let colour = std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    print(&drawing(&row, colour, &text)?)?;
    Ok(Outcome::Done)
}

fn find(reader: &Reader, arguments: &Arguments) -> Result<Trajectory> {
    for row in reader.rows() {
        interrupt::check()?;
        let row = row?;
        if arguments.sample.as_ref().is_none_or(|wanted| *wanted == row.sample_id) {
            return Ok(row);
        }
    }
    let message = match &arguments.sample {
        Some(sample) => format!("has no row with sample id `{sample}`"),
        None => "has no rows".to_owned(),
    };
    Err(Error::file(&arguments.data, message))
}

fn as_json(row: &Trajectory, text: &impl Fn(i32) -> Result<String>) -> Result<()> {
    let mut blocks = Vec::new();
    for block in &row.blocks {
        let mut states = Vec::new();
        for (state, standings) in block.states.iter().zip(standings(block)) {
            let texts = state.iter().map(|&id| text(id)).collect::<Result<Vec<_>>>()?;
            states.push(json!({ "ids": state, "texts": texts, "standings": standings }));
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
        "blocks": blocks,
    }))
}

/// The blocks of a response, one state a line. Without colour, `+` marks what is right early and `-` what is wrong.
fn drawing(row: &Trajectory, colour: bool, text: &impl Fn(i32) -> Result<String>) -> Result<String> {
    let paint = |standing, token: &str| match (colour, standing) {
        (true, Standing::Final) => format!("\x1b[32m{token}\x1b[0m"),
        (true, Standing::Early) => format!("\x1b[36m{token}\x1b[0m"),
        (true, Standing::Wrong) => format!("\x1b[31m{token}\x1b[0m"),
        (false, Standing::Final) => token.to_owned(),
        (false, Standing::Early) => format!("+{token}"),
        (false, Standing::Wrong) => format!("-{token}"),
    };
    let legend: Vec<_> = [(Standing::Final, "final"), (Standing::Early, "right early"), (Standing::Wrong, "wrong")]
        .map(|(standing, name)| paint(standing, name))
        .into();
    let mut drawn = format!("{} ({}): {}\n", row.sample_id, row.source, legend.join(", "));
    for (index, block) in row.blocks.iter().enumerate() {
        let _ = write!(drawn, "\nblock {index}, from token {}\n", block.start);
        for (number, (state, standings)) in block.states.iter().zip(standings(block)).enumerate() {
            let changed = row.augmented.as_ref().is_some_and(|flags| flags[index][number]);
            let _ = write!(drawn, "{number:>4}{}", if changed { "a " } else { "  " });
            for (&id, standing) in state.iter().zip(standings) {
                // A token never breaks the line or sends the terminal a command.
                let token: String = text(id)?.chars().flat_map(printable).collect();
                let _ = write!(drawn, " {}", paint(standing, &token));
            }
            drawn.push('\n');
        }
    }
    Ok(drawn.trim_end().to_owned())
}

fn printable(letter: char) -> Vec<char> {
    if letter.is_control() { letter.escape_default().collect() } else { vec![letter] }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_final_early_or_wrong() {
        let block = Block { start: 0, states: vec![vec![1, 9, 3], vec![1, 2, 3]] };
        let expected = [[Standing::Final, Standing::Wrong, Standing::Early], [Standing::Final; 3]];
        assert_eq!(standings(&block), expected.map(|state| state.to_vec()));
        assert_eq!(printable('\x1b').into_iter().collect::<String>(), "\\u{1b}");
    }
}
