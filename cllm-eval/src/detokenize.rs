//! Turns tokens that arrive forward by forward into the text that each forward added.

use cllm_core::tokenizer::{DecodeStream, Tokenizer};
use cllm_core::{Error, Result};

/// Decodes a growing answer. A character whose bytes are in several tokens comes with the last of them.
pub struct Detokenizer<'t> {
    tokenizer: &'t Tokenizer,
    stream: DecodeStream<'t>,
    ids: Vec<i32>,
    /// Length of the text that was returned so far.
    num_bytes: usize,
}

impl<'t> Detokenizer<'t> {
    pub fn new(tokenizer: &'t Tokenizer) -> Self {
        Detokenizer { tokenizer, stream: tokenizer.decode_stream(), ids: Vec::new(), num_bytes: 0 }
    }

    /// The text that `ids` complete.
    ///
    /// # Errors
    /// When the tokenizer fails.
    pub fn push(&mut self, ids: &[i32]) -> Result<String> {
        let mut text = String::new();
        for &id in ids {
            let added = self.stream.step(id as u32).map_err(|error| Error::usage(format!("tokenizer: {error}")))?;
            text += added.as_deref().unwrap_or_default();
        }
        self.ids.extend(ids);
        self.num_bytes += text.len();
        Ok(text)
    }

    /// What is left at the end of the answer: a character that is not complete.
    ///
    /// # Errors
    /// When the tokenizer fails.
    pub fn finish(self) -> Result<String> {
        Ok(self.tokenizer.decode(&self.ids)?.get(self.num_bytes..).unwrap_or_default().to_owned())
    }
}

/// Splits the text of an answer by the forwards that accepted its tokens, given the number of tokens of each.
///
/// # Errors
/// When the tokenizer fails.
pub fn split_by_forward(tokenizer: &Tokenizer, ids: &[i32], num_accepted: &[u32]) -> Result<Vec<String>> {
    let mut detokenizer = Detokenizer::new(tokenizer);
    let mut rest = ids;
    let mut texts = Vec::with_capacity(num_accepted.len());
    for &count in num_accepted {
        let (accepted, later) = rest.split_at((count as usize).min(rest.len()));
        texts.push(detokenizer.push(accepted)?);
        rest = later;
    }
    if let Some(last) = texts.last_mut() {
        last.push_str(&detokenizer.finish()?);
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
        let one_by_one = split_by_forward(&tokenizer, &ids, &vec![1; ids.len()]).unwrap();
        assert_eq!(one_by_one, ["a", "", "", "数", "b"]);
        // An answer may end inside a character.
        let cut = split_by_forward(&tokenizer, &ids[..3], &[2, 1]).unwrap();
        assert_eq!(cut[0], "a");
        assert!(cut[1].chars().all(|character| character == '\u{fffd}') && !cut[1].is_empty(), "{cut:?}");
    }
}
