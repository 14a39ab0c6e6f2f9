//! What the responses of a collection amount to: those of one run, and all that are in the data set.

use std::path::Path;

use cllm_core::task::Verdict;
use cllm_core::tokenizer::Tokenizer;
use cllm_core::trajectory::{FinishReason, Reader, Trajectory};
use cllm_core::{Result, interrupt};
use rayon::prelude::*;
use serde::Serialize;

use crate::scoring::score;

/// Sums over responses.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Tally {
    all: Sums,
    /// Of the responses that ended with EOS: what loops until the length limit decodes fast and flatters the whole.
    finished: Sums,
    blocks: usize,
    scored: usize,
    right: usize,
}

#[derive(Debug, Clone, Copy, Default)]
struct Sums {
    rows: usize,
    tokens: usize,
    forwards: usize,
}

/// A [`Tally`] as it is shown.
#[derive(Debug, Serialize)]
pub(crate) struct Figures {
    /// Responses.
    rows: usize,
    /// Those that ended with EOS.
    finished: usize,
    /// Those that hit the length limit.
    unfinished: usize,
    /// Tokens of the responses.
    pub(crate) response_tokens: usize,
    /// Forwards that they took.
    forwards: usize,
    /// Tokens over forwards; none without a forward.
    tokens_per_forward: Option<f64>,
    /// The same of the finished responses alone.
    tokens_per_forward_finished: Option<f64>,
    /// Blocks.
    blocks: usize,
    /// Responses that the task could score.
    scored: usize,
    /// Share of these that are right.
    accuracy: Option<f64>,
}

impl std::fmt::Display for Figures {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(out, "{} responses, {} of them unfinished", self.rows, self.unfinished)?;
        self.tokens_per_forward.map_or(Ok(()), |all| write!(out, ", {all:.2} tokens per forward"))?;
        self.tokens_per_forward_finished.map_or(Ok(()), |finished| write!(out, " ({finished:.2} of the finished)"))
    }
}

impl Sums {
    fn add(&mut self, other: Sums) {
        self.rows += other.rows;
        self.tokens += other.tokens;
        self.forwards += other.forwards;
    }
}

impl Tally {
    /// That of one response.
    pub(crate) fn of(row: &Trajectory, forwards: usize, verdict: Verdict) -> Self {
        let sums = Sums { rows: 1, tokens: row.response_ids.len(), forwards };
        Tally {
            all: sums,
            finished: if row.finish_reason == FinishReason::Eos { sums } else { Sums::default() },
            blocks: row.blocks.len(),
            scored: usize::from(verdict != Verdict::Unscored),
            right: usize::from(verdict == Verdict::Correct),
        }
    }

    /// That of rows which an earlier run had collected; their forwards are told by their states.
    pub(crate) fn of_rows(
        rows: impl Iterator<Item = Result<Trajectory>>,
        file: &Path,
        tokenizer: &Tokenizer,
        data: Option<&Path>,
    ) -> Result<Self> {
        let mut tally = Tally::default();
        for row in rows {
            interrupt::check()?;
            let row = row?;
            let verdict = score(file, &row, &tokenizer.decode(&row.response_ids)?, data)?;
            tally.add(Tally::of(&row, row.num_forwards(), verdict));
        }
        Ok(tally)
    }

    /// That of a whole data set.
    pub(crate) fn of_data_set(folder: &Path, tokenizer: &Tokenizer, data: Option<&Path>) -> Result<Self> {
        let reader = Reader::open_incomplete(folder)?;
        let tally = |piece| Tally::of_rows(reader.chunk_rows(piece), folder, tokenizer, data);
        let of_pieces = reader.row_chunks().par_iter().map(tally).collect::<Result<Vec<_>>>()?;
        let mut sum = Tally::default();
        of_pieces.into_iter().for_each(|tally| sum.add(tally));
        Ok(sum)
    }

    /// Adds another.
    pub(crate) fn add(&mut self, other: Tally) {
        self.all.add(other.all);
        self.finished.add(other.finished);
        self.blocks += other.blocks;
        self.scored += other.scored;
        self.right += other.right;
    }

    /// Number of responses.
    pub(crate) fn rows(&self) -> usize {
        self.all.rows
    }

    /// As it is shown.
    pub(crate) fn figures(&self) -> Figures {
        let ratio = |a: usize, b: usize| (b > 0).then(|| a as f64 / b as f64);
        Figures {
            rows: self.all.rows,
            finished: self.finished.rows,
            unfinished: self.all.rows - self.finished.rows,
            response_tokens: self.all.tokens,
            forwards: self.all.forwards,
            tokens_per_forward: ratio(self.all.tokens, self.all.forwards),
            tokens_per_forward_finished: ratio(self.finished.tokens, self.finished.forwards),
            blocks: self.blocks,
            scored: self.scored,
            accuracy: ratio(self.right, self.scored),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_that_never_end_are_told_apart() {
        let row = |tokens: usize, finish_reason| Trajectory {
            sample_id: "a".into(),
            source: "jsonl/train".into(),
            prompt: String::new(),
            prompt_ids: vec![],
            response_ids: vec![1; tokens],
            reference: None,
            blocks: vec![],
            augmented: None,
            finish_reason,
            meta: None,
        };
        let mut tally = Tally::of(&row(6, FinishReason::Eos), 4, Verdict::Correct);
        assert_eq!(
            tally.figures().to_string(),
            "1 responses, 0 of them unfinished, 1.50 tokens per forward (1.50 of the finished)"
        );
        tally.add(Tally::of(&row(40, FinishReason::Length), 6, Verdict::Unscored));
        let figures = tally.figures();
        assert_eq!((figures.rows, figures.finished, figures.unfinished, figures.forwards), (2, 1, 1, 10));
        assert_eq!((figures.tokens_per_forward, figures.tokens_per_forward_finished), (Some(4.6), Some(1.5)));
        assert_eq!((figures.scored, figures.accuracy), (1, Some(1.0)));
        assert_eq!(Tally::default().figures().tokens_per_forward, None);
    }
}
