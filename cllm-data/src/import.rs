//! `import`: reads a JSON trajectory file of the reference implementation into a data set.
//!
//! The file has one record per block. The reference implementation cleans block by block, so a
//! response may lack some of its blocks: its row ends before the first one that is missing.

use std::path::{Path, PathBuf};

use clap::Args;
use cllm_core::chat_template::RenderingRecord;
use cllm_core::checkpoint::{self, hub};
use cllm_core::program::Outcome;
use cllm_core::progress::{self, count};
use cllm_core::thought::ThoughtLimit;
use cllm_core::tokenizer::Tokenizer;
use cllm_core::trajectory::{Block, FinishReason, Provenance, Trajectory, Writer};
use cllm_core::{Error, Result, fingerprint, interrupt};

use crate::dataset_card::finish_with_card;
use crate::reference_format::{self, Ids, Record};

const ROWS_PER_SHARD: usize = 1024;

#[derive(Args)]
pub(crate) struct Arguments {
    /// The JSON file.
    file: PathBuf,
    /// Folder of the data set to write.
    #[arg(long, short)]
    output: PathBuf,
    /// The teacher: a folder, or an id in the Hugging Face cache.
    #[arg(long)]
    model: String,
    /// Benchmark and split of rows for which the file names none.
    #[arg(long, default_value = "jsonl/imported")]
    source: String,
    /// Maximum number of tokens in a response when it was collected (`max_new_seq_len`).
    #[arg(long, default_value_t = 512)]
    max_new_tokens: usize,
    /// Number of tokens after which thoughts were closed when it was collected.
    #[arg(long)]
    max_thinking_tokens: Option<usize>,
}

/// Writes the data set.
///
/// # Errors
/// When the file has another format, or a row breaks a guarantee of the data format.
pub(crate) fn run(arguments: &Arguments) -> Result<Outcome> {
    let (path, output) = (&arguments.file, &arguments.output);
    let folder = hub::locate(&arguments.model)?;
    let tokenizer = Tokenizer::load(&folder)?;
    let provenance = provenance(arguments, &folder, &tokenizer)?;
    let mut writer = Writer::create(output, provenance.clone())?;
    let mut importer =
        Importer { file: path, source: &arguments.source, tokenizer, provenance, num_truncated: 0, num_dropped: 0 };

    // The records of one response are consecutive.
    let mut records: Vec<Record> = Vec::new();
    let mut rows = Vec::new();
    reference_format::read(path, |record| {
        interrupt::check()?;
        if records.first().is_some_and(|first| first.data_id != record.data_id) {
            rows.extend(importer.join(std::mem::take(&mut records))?);
        }
        records.push(record);
        if rows.len() == ROWS_PER_SHARD {
            writer.write_shard(&rows)?;
            rows.clear();
        }
        Ok(())
    })?;
    rows.extend(importer.join(records)?);
    writer.write_shard(&rows)?;
    let num_rows = finish_with_card(writer)?;
    progress::log(format!(
        "{} in {}; {} truncated before a missing block, {} dropped because the first block is missing",
        count(num_rows, "row"),
        output.display(),
        importer.num_truncated,
        importer.num_dropped
    ));
    Ok(Outcome::Done)
}

fn provenance(arguments: &Arguments, model_folder: &Path, tokenizer: &Tokenizer) -> Result<Provenance> {
    let new_limit = |max| ThoughtLimit::new(tokenizer, max, arguments.max_new_tokens);
    let thought_limit = arguments.max_thinking_tokens.map(new_limit).transpose()?;
    Ok(Provenance {
        teacher: checkpoint::fingerprint(model_folder)?,
        tokenizer: tokenizer.fingerprint().to_owned(),
        vocab_size: checkpoint::load_config(model_folder)?.vocab_size as usize,
        n: block_size(&arguments.file)?,
        max_new_tokens: arguments.max_new_tokens,
        thought_closing: thought_limit.map(|limit| limit.closing),
        eos_ids: tokenizer.eos_ids().to_vec(),
        seed: 0,
        prompts: fingerprint::hash_contents(&arguments.file)?,
        rendering: RenderingRecord::default(),
        toolkit: cllm_core::VERSION.to_owned(),
        steps: vec!["import: a file of the reference implementation".to_owned()],
    })
}

/// The length of the first state in the file.
fn block_size(path: &Path) -> Result<usize> {
    let mut length = None;
    reference_format::read(path, |record| {
        length = length.or(record.answer_trajectory_ids.first().map(Vec::len));
        Ok(())
    })?;
    length.filter(|&length| length > 0).ok_or_else(|| Error::file(path, "has no record with states"))
}

/// Joins the records of a response into its row.
struct Importer<'a> {
    file: &'a Path,
    /// Source of rows whose record names none.
    source: &'a str,
    tokenizer: Tokenizer,
    provenance: Provenance,
    /// Number of rows that end before a missing block.
    num_truncated: usize,
    /// Number of responses without a first block, which have no row.
    num_dropped: usize,
}

impl Importer<'_> {
    fn join(&mut self, records: Vec<Record>) -> Result<Option<Trajectory>> {
        let mut records = self.leading_blocks(records)?.into_iter();
        let Some(first) = records.next() else { return Ok(None) };
        let prompt_ids = first.prompt_ids.flatten();
        let mut row = Trajectory {
            sample_id: first.data_id,
            source: first.source.unwrap_or_else(|| self.source.to_owned()),
            prompt: match first.prompt {
                Some(prompt) => prompt,
                None => self.tokenizer.decode(&prompt_ids)?,
            },
            prompt_ids,
            response_ids: Vec::new(),
            reference: first.reference,
            reference_ids: first.reference_ids,
            blocks: Vec::new(),
            augmented: None,
            finish_reason: FinishReason::Length,
            meta: first.meta,
        };
        let first_block = (row.prompt_ids.len(), first.answer_trajectory_ids);
        let later_blocks = records.map(|record| (record.prompt_ids.flatten().len(), record.answer_trajectory_ids));
        self.append_blocks(&mut row, std::iter::once(first_block).chain(later_blocks))?;
        let complete = first.complete_teacher_output_ids.map(Ids::flatten);
        truncate_to_complete_output(&mut row, complete.as_deref());
        match row.check(&self.provenance) {
            Ok(()) => Ok(Some(row)),
            Err(message) => Err(self.error(&row.sample_id, &message)),
        }
    }

    /// Sorts the records of a response by block and removes those after the first missing block.
    fn leading_blocks(&mut self, mut records: Vec<Record>) -> Result<Vec<Record>> {
        if let Some(malformed) = records.iter().find(|record| record.block_index().is_none()) {
            return Err(self.error(&malformed.data_id, "jacobian_itr_id does not have the form itr_0"));
        }
        records.sort_by_key(Record::block_index);
        let is_next = |(index, record): &(usize, &Record)| record.block_index() == Some(*index);
        let num_leading = records.iter().enumerate().take_while(is_next).count();
        self.num_truncated += usize::from(num_leading > 0 && num_leading < records.len());
        self.num_dropped += usize::from(num_leading == 0 && !records.is_empty());
        records.truncate(num_leading);
        Ok(records)
    }

    /// Appends blocks, each with the number of tokens before it, to the row up to the one that ends
    /// with EOS.
    fn append_blocks(&self, row: &mut Trajectory, blocks: impl Iterator<Item = (usize, Vec<Vec<i32>>)>) -> Result<()> {
        for (num_before, states) in blocks {
            if let Some(closing) = &self.provenance.thought_closing
                && num_before > row.prompt_ids.len() + row.response_ids.len()
            {
                row.response_ids.extend(&closing.closing_ids);
            }
            let start = row.response_ids.len() as u32;
            let Some(fixed_point) = states.last() else {
                return Err(self.error(&row.sample_id, "a block has no states"));
            };
            let eos = fixed_point.iter().position(|id| self.provenance.eos_ids.contains(id));
            row.response_ids.extend(&fixed_point[..eos.map_or(fixed_point.len(), |eos| eos + 1)]);
            row.blocks.push(Block { start, states });
            if eos.is_some() {
                row.finish_reason = FinishReason::Eos;
                break;
            }
        }
        Ok(())
    }

    fn error(&self, data_id: &str, message: &str) -> Error {
        Error::file(self.file, format!("data_id `{data_id}`: {message}"))
    }
}

/// Shortens a response that reached the length limit inside its last block to the length of the
/// complete output.
fn truncate_to_complete_output(row: &mut Trajectory, complete: Option<&[i32]>) {
    let length = complete.map_or(usize::MAX, |complete| complete.len().saturating_sub(row.prompt_ids.len()));
    let last_start = row.blocks.last().map_or(0, |block| block.start as usize);
    if row.finish_reason == FinishReason::Length && length > last_start {
        row.response_ids.truncate(length);
    }
}
