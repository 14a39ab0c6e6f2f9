//! The text of an answer, split by the forwards that accepted its tokens.

use std::ops::Range;

use cllm_core::Result;
use cllm_core::tokenizer::Tokenizer;

/// Returns the text that each forward added to the answer to a prompt, given the number of tokens
/// that it accepted. A character that spans several tokens belongs to the forward of the last of
/// them. The `forced` tokens, which closed the thought at its limit, belong to the forward that
/// accepted the token after them.
///
/// # Errors
/// When the tokenizer fails.
pub fn split_by_forward(
    tokenizer: &Tokenizer,
    prompt_ids: &[i32],
    ids: &[i32],
    num_accepted: &[u32],
    forced: Range<usize>,
) -> Result<Vec<String>> {
    let mut stream = tokenizer.decode_stream(prompt_ids)?;
    let mut start = 0;
    let mut texts = Vec::with_capacity(num_accepted.len());
    for &count in num_accepted {
        let num_forced = if start == forced.start { forced.len() } else { 0 };
        let end = (start + num_forced + count as usize).min(ids.len());
        texts.push(stream.push(&ids[start..end])?);
        start = end;
    }
    if let Some(last) = texts.last_mut() {
        last.push_str(&stream.finish()?);
    }
    Ok(texts)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn a_character_of_several_tokens_comes_whole_with_the_last_of_them() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../configs/tiny-teacher");
        let tokenizer = Tokenizer::load(Path::new(folder)).unwrap();
        let ids = tokenizer.encode("a数b").unwrap();
        let one_by_one = split_by_forward(&tokenizer, &[], &ids, &vec![1; ids.len()], 0..0).unwrap();
        assert_eq!(one_by_one, ["a", "", "", "数", "b"]);
        // An answer may end inside a character.
        let cut = split_by_forward(&tokenizer, &[], &ids[..3], &[2, 1], 0..0).unwrap();
        assert_eq!(cut[0], "a");
        // Tokens 1 to 3 were not decoded.
        assert_eq!(split_by_forward(&tokenizer, &[], &ids, &[1, 1], 1..4).unwrap(), ["a", "数b"]);
        assert!(cut[1].chars().all(|character| character == '\u{fffd}') && !cut[1].is_empty(), "{cut:?}");
    }
}
