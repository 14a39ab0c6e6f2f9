//! Answers on their way into shards: they come in any order, and leave in that of the prompts.

use std::collections::BTreeMap;
use std::path::Path;

use cllm_core::Result;
use cllm_core::decode::Answer;
use cllm_core::prompt_set::Sample;
use cllm_core::task::{ScoreContext, Task};
use cllm_core::tokenizer::Tokenizer;
use cllm_core::trajectory::{Trajectory, Writer};
use rayon::prelude::*;

use crate::collect::stats::Tally;

/// A prompt as the model reads it.
pub(crate) struct Prepared {
    pub(crate) sample: Sample,
    /// The rendered text.
    pub(crate) prompt: String,
    pub(crate) ids: Vec<i32>,
}

/// The rows of the shards that are not written yet, as far as they are there.
pub(crate) struct Shelf<'p> {
    writer: Writer,
    prepared: &'p [Prepared],
    rows_per_shard: usize,
    tokenizer: &'p Tokenizer,
    data: Option<&'p Path>,
    /// By the number of their prompt.
    rows: BTreeMap<usize, Trajectory>,
}

impl<'p> Shelf<'p> {
    /// Takes up what earlier runs left, and says what that amounts to.
    ///
    /// # Errors
    /// When a shard cannot be read.
    pub(crate) fn open(
        writer: Writer,
        prepared: &'p [Prepared],
        rows_per_shard: usize,
        tokenizer: &'p Tokenizer,
        data: Option<&'p Path>,
    ) -> Result<(Self, Tally)> {
        let in_shards = (writer.shards() * rows_per_shard).min(prepared.len());
        let mut stopped: BTreeMap<String, Trajectory> =
            writer.partial_rows().into_iter().map(|row| (row.sample_id.clone(), row)).collect();
        let open = prepared.iter().enumerate().skip(in_shards);
        let rows: BTreeMap<usize, Trajectory> =
            open.filter_map(|(index, prepared)| Some((index, stopped.remove(&prepared.sample.id)?))).collect();
        let folder = writer.folder().to_owned();
        let mut earlier = Tally::of_rows(rows.values().cloned().map(Ok), &folder, tokenizer, data)?;
        if in_shards > 0 {
            earlier.add(Tally::of_data_set(&folder, tokenizer, data)?);
        }
        let mut shelf = Shelf { writer, prepared, rows_per_shard, tokenizer, data, rows };
        shelf.write_whole_shards()?;
        Ok((shelf, earlier))
    }

    /// Rows that are there, written or not.
    pub(crate) fn rows(&self) -> usize {
        self.written() + self.rows.len()
    }

    fn written(&self) -> usize {
        (self.writer.shards() * self.rows_per_shard).min(self.prepared.len())
    }

    /// The prompts that lack an answer: shard by shard, the short ones of a shard first, so that its rows are of like length.
    pub(crate) fn open_by_length(&self) -> Vec<usize> {
        let mut open: Vec<usize> =
            (self.written()..self.prepared.len()).filter(|index| !self.rows.contains_key(index)).collect();
        open.sort_by_key(|&index| (index / self.rows_per_shard, self.prepared[index].ids.len(), index));
        open
    }

    /// Scores some answers, each with the number of its prompt, and writes the shards that become whole.
    ///
    /// # Errors
    /// What scoring and writing fail with.
    pub(crate) fn put(&mut self, answers: Vec<(usize, Answer)>) -> Result<Tally> {
        let scored: Vec<(usize, Trajectory, Tally)> =
            answers.into_par_iter().map(|(index, answer)| self.row(index, answer)).collect::<Result<_>>()?;
        let mut tally = Tally::default();
        for (index, row, of_row) in scored {
            tally.add(of_row);
            self.rows.insert(index, row);
        }
        self.write_whole_shards()?;
        Ok(tally)
    }

    fn row(&self, index: usize, answer: Answer) -> Result<(usize, Trajectory, Tally)> {
        let Prepared { sample, prompt, ids } = &self.prepared[index];
        let row = Trajectory {
            sample_id: sample.id.clone(),
            source: sample.source.clone(),
            prompt: prompt.clone(),
            prompt_ids: ids.clone(),
            response_ids: answer.response_ids,
            reference: sample.reference.clone(),
            blocks: answer.blocks,
            augmented: None,
            finish_reason: answer.finish_reason,
            meta: sample.meta.as_ref().map(ToString::to_string),
        };
        let text = self.tokenizer.decode(&row.response_ids)?;
        let judge = ScoreContext { data: self.data, sandbox: None };
        let verdict = Task::from_source(&sample.source).score(judge, sample, &text, row.finish_reason)?;
        let tally = Tally::of(&row, answer.num_forwards, verdict);
        Ok((index, row, tally))
    }

    fn write_whole_shards(&mut self) -> Result<()> {
        loop {
            let first = self.written();
            let end = (first + self.rows_per_shard).min(self.prepared.len());
            if first == end || self.rows.range(first..end).count() < end - first {
                return Ok(());
            }
            let after = self.rows.split_off(&end);
            let rows: Vec<Trajectory> = std::mem::replace(&mut self.rows, after).into_values().collect();
            self.writer.write_shard(&rows)?;
        }
    }

    /// Ends the collection. Unless it is `complete`, the rows of shards that are not whole are kept beside them.
    ///
    /// # Errors
    /// File-system errors.
    pub(crate) fn close(self, complete: bool) -> Result<Writer> {
        if complete {
            self.writer.remove_partial_rows()?;
        } else {
            self.writer.save_partial_rows(&self.rows.into_values().collect::<Vec<_>>())?;
        }
        Ok(self.writer)
    }
}
