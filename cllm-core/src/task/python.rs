//! What Python tasks have in common: reading the code of an answer, and running it with its tests.

use std::sync::LazyLock;

use regex::Regex;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::answer::FencedText;
use super::verdict::Verdict;
use crate::prompt_set::Sample;
use crate::sandbox::{ProgramOutcome, Sandbox};
use crate::{Error, Result};

/// Makes a program of [`Parts`], which is as trusted as this file.
const EVALUATOR: &str = include_str!("evaluator.py");

/// What an answer must solve.
#[derive(Serialize)]
pub(super) struct Problem<'a> {
    /// Code that the answer may continue; empty if it stands alone.
    pub(super) prompt: &'a str,
    /// The function that the answer must define; without it, what the tests name.
    pub(super) entry_point: Option<&'a str>,
    /// Code that runs after the answer, which is correct if this reaches its end.
    pub(super) tests: &'a str,
}

/// What a program is made of.
#[derive(Serialize)]
struct Parts<'a> {
    #[serde(flatten)]
    problem: Problem<'a>,
    /// Info string and content of every fenced block.
    blocks: Vec<(&'a str, String)>,
    unfenced: String,
}

/// A function's definition, with its name.
static DEFINITION: LazyLock<Regex> =
    LazyLock::new(|| Regex::new(r"(?m)^\s*(?:async\s+)?def\s+(\w+)").expect("the pattern is valid"));

/// The code of an answer that is compared with a reference: the last fenced block that defines the
/// reference's function, or else the last one that is not empty, or else the whole answer.
pub fn compared_code(answer: &str, reference: &str) -> String {
    let name = |code: &str| DEFINITION.captures(code).map(|definition| definition[1].to_owned());
    let wanted = name(reference);
    let defines = |code: &String| DEFINITION.captures_iter(code).any(|found| Some(&found[1]) == wanted.as_deref());
    let FencedText { blocks, unfenced } = FencedText::read(answer);
    let mut codes: Vec<String> =
        blocks.into_iter().map(|block| block.content).filter(|code| !code.trim().is_empty()).collect();
    let wanted_at = codes.iter().rposition(defines);
    match wanted_at {
        Some(index) => codes.swap_remove(index),
        None => codes.pop().unwrap_or(unfenced),
    }
}

/// Reads the fields of a sample's `meta` that scoring needs.
pub(super) fn read_meta<T: DeserializeOwned>(sample: &Sample) -> Result<T> {
    serde_json::from_value(sample.meta.clone().unwrap_or_default()).map_err(|error| {
        let id = &sample.id;
        Error::usage(format!(
            "prompt `{id}`: meta lacks what its tests need ({error}): make the prompt set again with `cllm-data prepare`"
        ))
    })
}

/// Runs an answer with the tests of its problem.
pub(super) fn score(sandbox: &Sandbox, problem: Problem, answer: &str) -> Result<Verdict> {
    let FencedText { blocks, unfenced } = FencedText::read(answer);
    let blocks = blocks.into_iter().map(|block| (block.info, block.content)).collect();
    let parts = serde_json::to_string(&Parts { problem, blocks, unfenced }).map_err(Error::serialization)?;
    Ok(Verdict::from_correct(sandbox.run_prepared(EVALUATOR, &parts)? == ProgramOutcome::Passed))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn code_that_is_compared_is_the_last_fenced_block_that_defines_the_function() {
        let code = "def f():\n    return 1\n";
        for (answer, expected) in [
            ("    return 1\n", "    return 1\n"),
            ("Here:\n```python\ndef f():\n    return 1\n```\nSo.\n```\n2\n```", code),
            ("```python\ndef f():\n    return 2\n```\nNo:\n```python\ndef f():\n    return 1\n```", code),
            ("```python\ndef f():\n    return 1\n```\n```python\ndef g():\n    return f()\n```", code),
            ("```\nx = 2\n```\n```\nx = 1", "x = 1"),
            ("```\nx = 1\n```\n```\n\n```", "x = 1\n"),
            ("    return 1\n```\n", "    return 1\n"),
        ] {
            assert_eq!(compared_code(answer, "@cache\nasync def f():\n    pass"), expected, "{answer}");
        }
        assert_eq!(compared_code("```\nx = 1\n```", "lambda: 1"), "x = 1\n");
    }
}
