//! Holds answers until their shard is complete: they finish in any order, but are written in the
//! order of the prompts.

use std::collections::BTreeMap;

use cllm_core::Result;
use cllm_core::decode::Answer;
use cllm_core::trajectory::{Trajectory, Writer};
use rayon::prelude::*;

use super::prompts::RenderedPrompt;
use super::stats::Counts;
use crate::scoring::Scorer;

pub(super) struct ShardBuffer<'p> {
    writer: Writer,
    prompts: &'p [RenderedPrompt],
    rows_per_shard: usize,
    scorer: Scorer<'p>,
    /// The rows of unwritten shards, by the index of their prompt.
    rows: BTreeMap<usize, Trajectory>,
}

impl<'p> ShardBuffer<'p> {
    /// Takes over the shards and the partial rows of earlier runs, and returns the counts of their
    /// rows.
    pub(super) fn open(
        writer: Writer,
        prompts: &'p [RenderedPrompt],
        rows_per_shard: usize,
        scorer: Scorer<'p>,
    ) -> Result<(Self, Counts)> {
        let mut buffer = ShardBuffer { writer, prompts, rows_per_shard, scorer, rows: BTreeMap::new() };
        buffer.rows = buffer.load_partial_rows();
        let mut counts = Counts::from_rows(buffer.rows.values().cloned().map(Ok), scorer)?;
        counts += Counts::from_shards(&buffer.writer, scorer)?;
        buffer.write_complete_shards()?;
        Ok((buffer, counts))
    }

    fn load_partial_rows(&self) -> BTreeMap<usize, Trajectory> {
        let mut partial: BTreeMap<String, Trajectory> =
            self.writer.partial_rows().into_iter().map(|row| (row.sample_id.clone(), row)).collect();
        let unwritten = self.prompts.iter().enumerate().skip(self.num_written());
        unwritten.filter_map(|(index, prompt)| Some((index, partial.remove(&prompt.sample.id)?))).collect()
    }

    /// Number of responses so far, written or not.
    pub(super) fn num_rows(&self) -> usize {
        self.num_written() + self.rows.len()
    }

    fn num_written(&self) -> usize {
        (self.writer.num_shards() * self.rows_per_shard).min(self.prompts.len())
    }

    /// Indices of the prompts without a response: shard by shard, so that shards are completed
    /// early, and within a shard by length, so that prompts of similar length share a batch.
    pub(super) fn missing_by_length(&self) -> Vec<usize> {
        let mut missing: Vec<usize> =
            (self.num_written()..self.prompts.len()).filter(|index| !self.rows.contains_key(index)).collect();
        missing.sort_by_key(|&index| (index / self.rows_per_shard, self.prompts[index].ids.len(), index));
        missing
    }

    /// Scores answers, each with the index of its prompt, and writes the shards that become
    /// complete.
    pub(super) fn store(&mut self, answers: Vec<(usize, Answer)>) -> Result<Counts> {
        let scored: Vec<(usize, Trajectory, Counts)> =
            answers.into_par_iter().map(|(index, answer)| self.score(index, answer)).collect::<Result<_>>()?;
        let mut counts = Counts::default();
        for (index, row, row_counts) in scored {
            counts += row_counts;
            self.rows.insert(index, row);
        }
        self.write_complete_shards()?;
        Ok(counts)
    }

    fn score(&self, index: usize, answer: Answer) -> Result<(usize, Trajectory, Counts)> {
        let RenderedPrompt { sample, text, ids, reference_ids } = &self.prompts[index];
        let row = Trajectory {
            sample_id: sample.id.clone(),
            source: sample.source.clone(),
            prompt: text.clone(),
            prompt_ids: ids.clone(),
            response_ids: answer.response_ids,
            reference: sample.reference.clone(),
            reference_ids: reference_ids.clone(),
            blocks: answer.blocks,
            augmented: None,
            finish_reason: answer.finish_reason,
            meta: sample.meta.as_ref().map(ToString::to_string),
        };
        let ends_inside_thought = self.scorer.ends_inside_thought(&row);
        let counts = Counts::from_row(&row, answer.num_forwards, self.scorer.score(&row)?, ends_inside_thought);
        Ok((index, row, counts))
    }

    fn write_complete_shards(&mut self) -> Result<()> {
        loop {
            let start = self.num_written();
            let end = (start + self.rows_per_shard).min(self.prompts.len());
            if start == end || self.rows.range(start..end).count() < end - start {
                return Ok(());
            }
            let later = self.rows.split_off(&end);
            let rows: Vec<Trajectory> = std::mem::replace(&mut self.rows, later).into_values().collect();
            self.writer.write_shard(&rows).map_err(|error| match self.num_written() {
                0 => error,
                _ => error.with_kept_work("finished shards are kept"),
            })?;
        }
    }

    /// Ends the collection and returns the writer. Without `all_decoded`, the rows of incomplete
    /// shards are saved for the next run.
    pub(super) fn close(mut self, all_decoded: bool) -> Result<Writer> {
        if all_decoded {
            self.writer.remove_partial_rows()?;
        } else {
            let rows: Vec<Trajectory> = self.rows.into_values().collect();
            self.writer.save_partial_rows(&rows)?;
        }
        Ok(self.writer)
    }
}
