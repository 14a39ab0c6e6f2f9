//! A row of a data set, and the guarantees that every row keeps.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::manifest::Provenance;
use crate::thought::ThoughtTokens;

/// Why a response ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FinishReason {
    /// It reached an EOS token, which is its last token.
    Eos,
    /// It reached the length limit.
    Length,
}

/// How one block of n tokens converged.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Block {
    /// Position of the block's first token in the response.
    pub start: u32,
    /// Every Jacobi state from the first draft to the fixed point, each exactly n tokens long.
    pub states: Vec<Vec<i32>>,
}

impl Block {
    /// Position in the response after its last token.
    pub(super) fn end(&self) -> usize {
        self.start as usize + self.states.last().map_or(0, Vec::len)
    }
}

/// One response and the trajectory of each of its blocks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trajectory {
    /// Id of the prompt in its prompt set.
    pub sample_id: String,
    /// Benchmark and split, such as `gsm8k/train`.
    pub source: String,
    /// The prompt as text, after the chat template.
    pub prompt: String,
    pub prompt_ids: Vec<i32>,
    /// The fixed points joined, through EOS or the length limit. If the thought was closed at its
    /// limit, the tokens that closed it stand between two blocks and belong to neither.
    pub response_ids: Vec<i32>,
    /// The benchmark's own answer.
    pub reference: Option<String>,
    /// The reference as the chat template renders it after the prompt, through EOS. Empty if it
    /// does not continue the prompt; `None` without a reference, and in data sets that older
    /// versions made.
    #[serde(default)]
    pub reference_ids: Option<Vec<i32>>,
    pub blocks: Vec<Block>,
    /// For each state of each block, whether `augment` changed it. `None`: nothing was augmented.
    pub augmented: Option<Vec<Vec<bool>>>,
    pub finish_reason: FinishReason,
    /// Data that the task needs to score the answer, as JSON text.
    pub meta: Option<String>,
}

impl Trajectory {
    /// Positions in the response of the tokens that closed the thought at its limit; an empty range
    /// if there are none.
    pub fn forced_tokens(&self) -> Range<usize> {
        let gap = |pair: &[Block]| {
            let gap = pair[0].end()..pair[1].start as usize;
            (!gap.is_empty()).then_some(gap)
        };
        self.blocks.windows(2).find_map(gap).unwrap_or(0..0)
    }

    /// Number of tokens of the response that the teacher decoded: all but those that closed its
    /// thought.
    pub fn num_decoded_tokens(&self) -> usize {
        self.response_ids.len() - self.forced_tokens().len()
    }

    /// Whether the response ended inside a thought, by EOS or at the length limit.
    pub fn ends_inside_thought(&self, tokens: &ThoughtTokens) -> bool {
        tokens.is_open(&self.prompt_ids, &self.response_ids)
    }

    /// Checks what every row of a data set guarantees: blocks of n tokens that follow one another
    /// and whose fixed points are the response, but for the tokens that close a thought at its limit
    /// between two of them, token ids inside the vocabulary, an end that agrees
    /// with the finish reason, and one augmented flag per state.
    ///
    /// # Errors
    /// The first guarantee that the row breaks, in words.
    pub fn check(&self, provenance: &Provenance) -> Result<(), String> {
        let (length, max_new_tokens) = (self.response_ids.len(), provenance.max_new_tokens);
        if length > max_new_tokens {
            return Err(format!("the response has {length} tokens, but max_new_tokens was {max_new_tokens}"));
        }
        self.check_blocks(provenance)?;
        self.check_ids(provenance.vocab_size)?;
        self.check_end(&provenance.eos_ids)?;
        self.check_augmented()
    }

    fn check_blocks(&self, Provenance { n, thought_closing, .. }: &Provenance) -> Result<(), String> {
        let (n, length) = (*n, self.response_ids.len());
        let mut fixed_points: Vec<i32> = Vec::new();
        for (index, block) in self.blocks.iter().enumerate() {
            if let Some(closing) = thought_closing
                && closing.max_thinking_tokens == fixed_points.len()
                && block.start as usize > fixed_points.len()
            {
                fixed_points.extend(&closing.closing_ids);
            }
            if block.start as usize != fixed_points.len() {
                return Err(format!("block {index} starts at {}, expected {}", block.start, fixed_points.len()));
            }
            if fixed_points.len() >= length {
                return Err(format!("block {index} starts at {}, past the response of {length} tokens", block.start));
            }
            if let Some(state) = block.states.iter().find(|state| state.len() != n) {
                return Err(format!("block {index} has a state of {} tokens, expected {n}", state.len()));
            }
            let fixed_point = block.states.last().ok_or_else(|| format!("block {index} has no states"))?;
            fixed_points.extend(fixed_point);
        }
        if fixed_points.len() < length || fixed_points[..length] != self.response_ids {
            return Err("the joined fixed points are not the response".to_owned());
        }
        Ok(())
    }

    fn check_ids(&self, vocab_size: usize) -> Result<(), String> {
        let states = self.blocks.iter().flat_map(|block| block.states.iter().flatten());
        let mut ids =
            self.prompt_ids.iter().chain(&self.response_ids).chain(self.reference_ids.iter().flatten()).chain(states);
        match ids.find(|&&id| id < 0 || id as usize >= vocab_size) {
            Some(id) => Err(format!("token {id} is outside the vocabulary of {vocab_size}")),
            None => Ok(()),
        }
    }

    fn check_end(&self, eos_ids: &[i32]) -> Result<(), String> {
        let length = self.response_ids.len();
        let ends_with_eos = self.response_ids.last().is_some_and(|last| eos_ids.contains(last));
        if ends_with_eos != (self.finish_reason == FinishReason::Eos) {
            return Err(format!("finish_reason is {:?}, but the last token says otherwise", self.finish_reason));
        }
        let before_last = &self.response_ids[..length.saturating_sub(1)];
        match before_last.iter().position(|id| eos_ids.contains(id)) {
            Some(index) => Err(format!("token {index} of the response is an EOS, but {} follow", length - 1 - index)),
            None => Ok(()),
        }
    }

    fn check_augmented(&self) -> Result<(), String> {
        let Some(augmented) = &self.augmented else { return Ok(()) };
        let one_flag_per_state = augmented.len() == self.blocks.len()
            && augmented.iter().zip(&self.blocks).all(|(flags, block)| flags.len() == block.states.len());
        if one_flag_per_state { Ok(()) } else { Err("`augmented` does not have one flag per state".to_owned()) }
    }
}
