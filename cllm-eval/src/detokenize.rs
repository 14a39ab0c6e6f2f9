//! The text that each forward made final.

use cllm_core::Result;
use cllm_core::tokenizer::Tokenizer;

/// Turns tokens that come in parts into text in parts; a character whose bytes are not all there waits for the rest.
pub struct Detokenizer<'t> {
    tokenizer: &'t Tokenizer,
    ids: Vec<i32>,
    shown: usize,
}

impl<'t> Detokenizer<'t> {
    /// Nothing so far.
    pub fn new(tokenizer: &'t Tokenizer) -> Self {
        Detokenizer { tokenizer, ids: Vec::new(), shown: 0 }
    }

    /// The text that `ids` add.
    ///
    /// # Errors
    /// When an id is none of the tokenizer's.
    pub fn push(&mut self, ids: &[i32]) -> Result<String> {
        self.ids.extend(ids);
        let text = self.tokenizer.decode(&self.ids)?;
        let whole = text.trim_end_matches('\u{fffd}');
        let piece = whole.get(self.shown..).unwrap_or_default().to_owned();
        self.shown = self.shown.max(whole.len());
        Ok(piece)
    }

    /// What was still waiting when the answer ended.
    ///
    /// # Errors
    /// When an id is none of the tokenizer's.
    pub fn finish(self) -> Result<String> {
        Ok(self.tokenizer.decode(&self.ids)?.get(self.shown..).unwrap_or_default().to_owned())
    }
}

/// The text of each forward's tokens.
///
/// # Errors
/// When an id is none of the tokenizer's.
pub fn split_by_forward(tokenizer: &Tokenizer, ids: &[i32], accepted: &[u32]) -> Result<Vec<String>> {
    let mut writer = Detokenizer::new(tokenizer);
    let mut rest = ids;
    let mut found = Vec::with_capacity(accepted.len());
    for &count in accepted {
        let (now, later) = rest.split_at((count as usize).min(rest.len()));
        found.push(writer.push(now)?);
        rest = later;
    }
    if let Some(last) = found.last_mut() {
        last.push_str(&writer.finish()?);
    }
    Ok(found)
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
