//! Statistics of collected responses, of one run and of the whole data set.

use std::fmt;
use std::ops::AddAssign;

use cllm_core::progress::count;
use cllm_core::task::Verdict;
use cllm_core::trajectory::{FinishReason, Reader, Trajectory, Writer};
use cllm_core::{Result, interrupt};
use rayon::prelude::*;
use serde::Serialize;

use crate::scoring::Scorer;

/// Sums over responses.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Counts {
    all: Sums,
    /// Sums over the responses that ended with EOS. A loop that runs into the length limit decodes
    /// fast and would flatter the speed of all.
    finished: Sums,
    num_blocks: usize,
    num_scored: usize,
    num_correct: usize,
    num_unfinished_thoughts: usize,
    num_closed_thoughts: usize,
}

#[derive(Debug, Clone, Copy, Default)]
struct Sums {
    num_rows: usize,
    num_tokens: usize,
    /// Tokens without those that closed a thought at its limit.
    num_decoded_tokens: usize,
    num_forwards: usize,
}

/// Statistics of some responses, as they are printed and saved.
#[derive(Debug, Serialize)]
pub struct ResponseStats {
    rows: usize,
    /// Responses that ended with EOS.
    finished: usize,
    /// Responses that reached the length limit.
    unfinished: usize,
    /// Responses that ended inside a thought, at the length limit or by EOS.
    unfinished_thoughts: usize,
    /// Responses whose thought was closed at `max_thinking_tokens`.
    closed_thoughts: usize,
    response_tokens: usize,
    /// Number of forwards that decoded them.
    forwards: usize,
    /// The tokens that closed thoughts are not counted: no forward decoded them.
    tokens_per_forward: Option<f64>,
    /// Tokens per forward of the finished responses alone.
    tokens_per_forward_finished: Option<f64>,
    blocks: usize,
    /// Responses that the task could score.
    scored: usize,
    /// Fraction of the scored responses that are correct.
    accuracy: Option<f64>,
}

impl fmt::Display for ResponseStats {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{}, {} unfinished", count(self.rows, "response"), self.unfinished)?;
        if self.unfinished_thoughts > 0 {
            write!(out, ", {} never closed", count(self.unfinished_thoughts, "thought"))?;
        }
        if self.closed_thoughts > 0 {
            write!(out, ", {} closed at max_thinking_tokens", count(self.closed_thoughts, "thought"))?;
        }
        self.tokens_per_forward.map_or(Ok(()), |all| write!(out, ", {all:.2} tokens per forward"))?;
        self.tokens_per_forward_finished.map_or(Ok(()), |finished| write!(out, " (finished: {finished:.2})"))
    }
}

impl AddAssign for Sums {
    fn add_assign(&mut self, other: Sums) {
        self.num_rows += other.num_rows;
        self.num_tokens += other.num_tokens;
        self.num_decoded_tokens += other.num_decoded_tokens;
        self.num_forwards += other.num_forwards;
    }
}

impl AddAssign for Counts {
    fn add_assign(&mut self, other: Counts) {
        self.all += other.all;
        self.finished += other.finished;
        self.num_blocks += other.num_blocks;
        self.num_scored += other.num_scored;
        self.num_correct += other.num_correct;
        self.num_unfinished_thoughts += other.num_unfinished_thoughts;
        self.num_closed_thoughts += other.num_closed_thoughts;
    }
}

impl Counts {
    /// The counts of one response that took `num_forwards` to decode.
    pub(super) fn from_row(row: &Trajectory, num_forwards: usize, verdict: Verdict, ends_inside_thought: bool) -> Self {
        let (num_tokens, num_decoded_tokens) = (row.response_ids.len(), row.num_decoded_tokens());
        let sums = Sums { num_rows: 1, num_tokens, num_decoded_tokens, num_forwards };
        Counts {
            all: sums,
            finished: if row.finish_reason == FinishReason::Eos { sums } else { Sums::default() },
            num_blocks: row.blocks.len(),
            num_scored: usize::from(verdict != Verdict::Unscored),
            num_correct: usize::from(verdict == Verdict::Correct),
            num_unfinished_thoughts: usize::from(ends_inside_thought),
            num_closed_thoughts: usize::from(!row.forced_tokens().is_empty()),
        }
    }

    /// The counts of rows that an earlier run collected. Their forwards are derived from their
    /// states.
    pub(super) fn from_rows(rows: impl Iterator<Item = Result<Trajectory>>, scorer: Scorer<'_>) -> Result<Self> {
        let mut counts = Counts::default();
        for row in rows {
            interrupt::check()?;
            let row = row?;
            counts += Counts::from_row(&row, row.num_forwards(), scorer.score(&row)?, scorer.ends_inside_thought(&row));
        }
        Ok(counts)
    }

    /// The counts of all shards written so far.
    pub(super) fn from_shards(writer: &Writer, scorer: Scorer<'_>) -> Result<Self> {
        let mut counts = Counts::default();
        if writer.num_shards() == 0 {
            return Ok(counts);
        }
        let reader = Reader::open_incomplete(writer.folder())?;
        let chunks = reader.row_chunks();
        let of_chunks = chunks.par_iter().map(|chunk| Counts::from_rows(reader.chunk_rows(chunk), scorer));
        of_chunks.collect::<Result<Vec<_>>>()?.into_iter().for_each(|of_chunk| counts += of_chunk);
        Ok(counts)
    }

    pub(super) fn num_rows(&self) -> usize {
        self.all.num_rows
    }

    /// Tokens that the teacher decoded.
    pub(super) fn num_decoded_tokens(&self) -> usize {
        self.all.num_decoded_tokens
    }

    pub(super) fn stats(&self) -> ResponseStats {
        let ratio = |a: usize, b: usize| (b > 0).then(|| a as f64 / b as f64);
        ResponseStats {
            rows: self.all.num_rows,
            finished: self.finished.num_rows,
            unfinished: self.all.num_rows - self.finished.num_rows,
            unfinished_thoughts: self.num_unfinished_thoughts,
            closed_thoughts: self.num_closed_thoughts,
            response_tokens: self.all.num_tokens,
            forwards: self.all.num_forwards,
            tokens_per_forward: ratio(self.all.num_decoded_tokens, self.all.num_forwards),
            tokens_per_forward_finished: ratio(self.finished.num_decoded_tokens, self.finished.num_forwards),
            blocks: self.num_blocks,
            scored: self.num_scored,
            accuracy: ratio(self.num_correct, self.num_scored),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unfinished_responses_are_counted_separately() {
        let row = |num_tokens: usize, finish_reason| Trajectory {
            sample_id: "a".into(),
            source: "jsonl/train".into(),
            prompt: String::new(),
            prompt_ids: vec![],
            response_ids: vec![1; num_tokens],
            reference: None,
            reference_ids: None,
            blocks: vec![],
            augmented: None,
            finish_reason,
            meta: None,
        };
        let mut counts = Counts::from_row(&row(6, FinishReason::Eos), 4, Verdict::Correct, false);
        let text = "1 response, 0 unfinished, 1.50 tokens per forward (finished: 1.50)";
        assert_eq!(counts.stats().to_string(), text);
        counts += Counts::from_row(&row(40, FinishReason::Length), 6, Verdict::Unscored, false);
        let stats = counts.stats();
        assert_eq!((stats.rows, stats.finished, stats.unfinished, stats.forwards), (2, 1, 1, 10));
        assert_eq!((stats.tokens_per_forward, stats.tokens_per_forward_finished), (Some(4.6), Some(1.5)));
        assert_eq!((stats.scored, stats.accuracy), (1, Some(1.0)));
        assert_eq!(Counts::default().stats().tokens_per_forward, None);
    }
}
