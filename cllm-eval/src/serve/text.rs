//! The text of an answer as it grows: whole characters only, and nothing that a stop text may begin
//! with until it is certain. Where tokens begin in texts is counted in characters.

use cllm_core::Result;
use cllm_core::tokenizer::{DecodeStream, Tokenizer};

/// Turns tokens into text up to the first stop text.
pub(super) struct AnswerText<'t> {
    /// `None` once the answer has ended.
    stream: Option<DecodeStream<'t>>,
    stops: &'t [String],
    /// Text that is not given out yet.
    held: String,
    /// Characters of the text so far.
    num_chars: usize,
}

/// What some tokens add to an answer.
#[derive(Debug, PartialEq)]
pub(super) struct Added {
    pub(super) text: String,
    /// Where each of the tokens begins in the answer. A token that is special or ends inside a
    /// character adds nothing. Those after the one that completes a stop text do not belong to the
    /// answer.
    pub(super) offsets: Vec<usize>,
    pub(super) is_stopped: bool,
}

impl<'t> AnswerText<'t> {
    /// # Errors
    /// When the tokenizer fails.
    pub(super) fn new(tokenizer: &'t Tokenizer, prompt_ids: &[i32], stops: &'t [String]) -> Result<Self> {
        Ok(AnswerText { stream: Some(tokenizer.decode_stream(prompt_ids)?), stops, held: String::new(), num_chars: 0 })
    }

    /// # Errors
    /// When the tokenizer fails.
    pub(super) fn push(&mut self, ids: &[i32]) -> Result<Added> {
        let mut offsets = Vec::with_capacity(ids.len());
        for id in ids {
            let Some(stream) = &mut self.stream else { break };
            offsets.push(self.num_chars + stream.num_complete_chars()?);
            let text = stream.push(&[*id])?;
            self.num_chars += text.chars().count();
            self.held.push_str(&text);
            if let Some(end) = self.find_stop() {
                self.stream = None;
                self.held.truncate(end);
                return Ok(Added { text: std::mem::take(&mut self.held), offsets, is_stopped: true });
            }
        }
        let certain = self.held.len() - self.uncertain_bytes();
        let text = self.held.drain(..certain).collect();
        Ok(Added { text, offsets, is_stopped: false })
    }

    /// The text that was still held back when the answer ended.
    ///
    /// # Errors
    /// When the tokenizer fails.
    pub(super) fn finish(&mut self) -> Result<String> {
        let rest = self.stream.take().map(DecodeStream::finish).transpose()?;
        self.held.push_str(&rest.unwrap_or_default());
        if let Some(end) = self.find_stop() {
            self.held.truncate(end);
        }
        Ok(std::mem::take(&mut self.held))
    }

    /// Where the first stop text begins.
    fn find_stop(&self) -> Option<usize> {
        self.stops.iter().filter_map(|stop| self.held.find(stop)).min()
    }

    /// Length of the longest end of the text that is the beginning of a stop text.
    fn uncertain_bytes(&self) -> usize {
        let begins_stop = |&start: &usize| self.stops.iter().any(|stop| stop.starts_with(&self.held[start..]));
        let mut starts = self.held.char_indices().map(|(start, _)| start);
        starts.find(begins_stop).map_or(0, |start| self.held.len() - start)
    }
}

/// Where each token of a prompt begins in its text.
///
/// # Errors
/// When the tokenizer fails.
pub(super) fn prompt_offsets(tokenizer: &Tokenizer, text: &str, ids: &[i32]) -> Result<Vec<usize>> {
    let mut stream = tokenizer.decode_stream(&[])?;
    let (mut num_chars, mut rest) = (0, text);
    let offset = |&id: &i32| {
        let num_before = stream.num_complete_chars()?;
        let start = num_chars + num_before;
        let mut added = stream.push(&[id])?;
        rest = rest.get(added.len()..).unwrap_or_default();
        if added.chars().count() == num_before && tokenizer.decode(&[id])?.is_empty() {
            // A special token, which is no text unless it is written in the prompt.
            let name = tokenizer.token_text(id);
            if let Some(after) = rest.strip_prefix(&name) {
                rest = after;
                added.push_str(&name);
            }
        }
        num_chars += added.chars().count();
        Ok(start)
    };
    ids.iter().map(offset).collect()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn tokenizer() -> Tokenizer {
        Tokenizer::load(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../configs/tiny-teacher"))).unwrap()
    }

    #[test]
    fn a_token_begins_after_the_characters_whose_bytes_came_before_it() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../cllm-core/tests/fixtures/tokenizers/llama-2");
        let tokenizer = Tokenizer::load(Path::new(folder)).unwrap();
        let text = "a数数b数</s></s>";
        let ids = tokenizer.encode(text).unwrap();
        let bytes = ids.iter().filter(|&&id| tokenizer.token_text(id).starts_with("<0x"));
        assert_eq!(bytes.count(), 9, "each byte is a token");
        let in_prompt = prompt_offsets(&tokenizer, text, &ids).unwrap();
        let num_first = ids.len() - 12;
        assert_eq!(in_prompt[num_first - 1..], [0, 1, 1, 1, 2, 2, 2, 3, 4, 4, 4, 5, 9][..]);
        for step in 1..=ids.len() {
            let mut answer = AnswerText::new(&tokenizer, &[], &[]).unwrap();
            let in_answer: Vec<_> = ids.chunks(step).flat_map(|ids| answer.push(ids).unwrap().offsets).collect();
            // Special tokens are not in the text of an answer.
            assert_eq!(in_answer[..ids.len() - 1], in_prompt[..ids.len() - 1]);
            assert_eq!(in_answer[ids.len() - 1], 5);
        }
    }

    /// The text of an answer that grows by `step` tokens, and how many of them belong to it.
    fn grown(ids: &[i32], stops: &[&str], step: usize) -> (String, usize, bool) {
        let (tokenizer, stops) = (tokenizer(), stops.iter().map(|&stop| stop.to_owned()).collect::<Vec<_>>());
        let mut answer = AnswerText::new(&tokenizer, &[], &stops).unwrap();
        let (mut text, mut num_tokens) = (String::new(), 0);
        for ids in ids.chunks(step) {
            let added = answer.push(ids).unwrap();
            text.push_str(&added.text);
            num_tokens += added.offsets.len();
            if added.is_stopped {
                return (text, num_tokens, true);
            }
        }
        (text + &answer.finish().unwrap(), num_tokens, false)
    }

    #[test]
    fn an_answer_ends_before_the_first_stop_text_however_many_tokens_come_at_once() {
        let text = "Mia has 12 cards. Mia sells 3 cards.";
        let ids = tokenizer().encode(text).unwrap();
        for step in 1..=ids.len() {
            assert_eq!(grown(&ids, &[], step), (text.to_owned(), ids.len(), false));
            let (stopped, num_tokens, is_stopped) = grown(&ids, &["never", "ards. Mia", "cards. M"], step);
            assert_eq!((stopped.as_str(), is_stopped), ("Mia has 12 ", true));
            assert!(num_tokens < ids.len());
            // A text that only begins like a stop text is given out in the end.
            assert_eq!(grown(&ids, &["cards. Mia sings", "3 cards.."], step).0, text);
        }
    }
}
