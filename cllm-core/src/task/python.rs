//! What Python tasks have in common: extracting the code of an answer, and running it with its
//! tests.

use serde::de::DeserializeOwned;

use super::verdict::Verdict;
use crate::prompt_set::Sample;
use crate::sandbox::{ProgramOutcome, Sandbox};
use crate::{Error, Result};

/// The code in an answer: the first fenced block for which `is_wanted` holds, or else the first
/// one. Without a fence it is the whole answer, up to a closing fence that was never opened.
pub fn extract_code(answer: &str, is_wanted: impl Fn(&str) -> bool) -> &str {
    let mut parts = answer.split("```");
    let before = parts.next().unwrap_or(answer);
    let blocks: Vec<&str> = parts.step_by(2).map(without_language).filter(|block| !block.trim().is_empty()).collect();
    blocks.iter().find(|block| is_wanted(block)).or(blocks.first()).copied().unwrap_or(before)
}

/// A fenced block without the rest of its first line, which names the language.
fn without_language(block: &str) -> &str {
    block.split_once('\n').map_or(block, |(_, code)| code)
}

/// The byte offset of the line `def NAME(`.
pub(super) fn find_definition(code: &str, name: &str) -> Option<usize> {
    let defines = |line: &str| {
        let line = line.strip_prefix("async ").unwrap_or(line);
        let rest = line.strip_prefix("def ").and_then(|line| line.trim_start().strip_prefix(name));
        rest.is_some_and(|rest| rest.trim_start().starts_with('('))
    };
    let mut next = 0;
    code.split_inclusive('\n').find_map(|line| {
        let start = next;
        next += line.len();
        defines(line).then_some(start)
    })
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

/// Runs a program, which is correct if it reaches its end.
pub(super) fn run_tests(sandbox: &Sandbox, program: &str) -> Result<Verdict> {
    Ok(Verdict::from_correct(sandbox.run(program)? == ProgramOutcome::Passed))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn code_is_extracted_from_its_fence() {
        let any = |_: &str| true;
        assert_eq!(extract_code("    return 1\n", any), "    return 1\n");
        assert_eq!(
            extract_code("Here:\n```python\ndef f():\n    return 1\n```\nIt returns 1.", any),
            "def f():\n    return 1\n"
        );
        assert_eq!(extract_code("```\nx = 1", any), "x = 1", "a fence that is never closed");
        assert_eq!(extract_code("    return 1\n```\n", any), "    return 1\n", "a fence that was never opened");
        let two = "```sh\npip install x\n```\n```python\ndef f(): pass\n```";
        assert_eq!(extract_code(two, |block| find_definition(block, "f").is_some()), "def f(): pass\n");
    }

    #[test]
    fn a_definition_is_a_line_at_the_margin() {
        assert_eq!(find_definition("import math\ndef f (x):\n", "f"), Some(12));
        assert_eq!(find_definition("async def f(x):\n", "f"), Some(0));
        for other in ["def ff(x):\n", "    def f(x):\n", "# def f(x)\n", "    return f(x)\n"] {
            assert_eq!(find_definition(other, "f"), None, "{other}");
        }
    }
}
