//! `import`: a JSON trajectory file of the reference implementation as a data set.

use std::path::PathBuf;

use clap::Args;
use cllm_core::checkpoint::hub;
use cllm_core::checkpoint::{self, fingerprint};
use cllm_core::program::Outcome;
use cllm_core::tokenizer::Tokenizer;
use cllm_core::trajectory::{Block, FinishReason, Provenance, Trajectory, Writer};
use cllm_core::{Error, Result, interrupt, progress};

use crate::reference_format::{self, Record};

/// Rows of a shard.
const SHARD_ROWS: usize = 1024;

/// Command line of `import`.
#[derive(Args)]
pub struct Arguments {
    /// The JSON file.
    file: PathBuf,
    /// Folder of the data set to write.
    #[arg(long, short)]
    output: PathBuf,
    /// The teacher: a folder, or an id in the Hugging Face cache.
    #[arg(long)]
    model: String,
    /// Benchmark and split that the rows get where the file names none.
    #[arg(long, default_value = "jsonl/imported")]
    source: String,
    /// Most tokens of a response when it was collected (`max_new_seq_len`).
    #[arg(long, default_value_t = 512)]
    max_new_tokens: usize,
}

/// Writes the data set.
///
/// # Errors
/// Files of another form, and rows that break the contract.
pub fn run(arguments: &Arguments) -> Result<Outcome> {
    let (path, output) = (&arguments.file, &arguments.output);
    let folder = hub::locate(&arguments.model)?;
    let tokenizer = Tokenizer::load(&folder)?;
    let provenance = Provenance {
        teacher: fingerprint(&folder)?,
        tokenizer: tokenizer.fingerprint().to_owned(),
        vocab_size: checkpoint::load_config(&folder)?.vocab_size as usize,
        n: block_size(arguments)?,
        max_new_tokens: arguments.max_new_tokens,
        eos_ids: tokenizer.eos_ids().to_vec(),
        seed: 0,
        prompts: cllm_core::fingerprint::hash_contents(path)?,
        toolkit: cllm_core::VERSION.to_owned(),
        steps: vec!["import: a file of the reference implementation".to_owned()],
    };
    let mut writer = Writer::create(output, provenance.clone())?;
    let mut import = Import { arguments, tokenizer, provenance, records: Vec::new(), cut: 0, dropped: 0 };
    let mut rows = Vec::new();
    reference_format::read(path, |record| {
        interrupt::check()?;
        if import.records.first().is_some_and(|first| first.data_id != record.data_id) {
            rows.extend(import.take_row()?);
        }
        import.records.push(record);
        if rows.len() == SHARD_ROWS {
            writer.write_shard(&rows)?;
            rows.clear();
        }
        Ok(())
    })?;
    rows.extend(import.take_row()?);
    writer.write_shard(&rows)?;
    let count = crate::rewrite::finish(writer, output)?;
    progress::log(format!(
        "{count} rows in {}; {} cut before a block that the file lacks, {} dropped for want of their first block",
        output.display(),
        import.cut,
        import.dropped
    ));
    Ok(Outcome::Done)
}

/// The length of the first state in the file.
fn block_size(arguments: &Arguments) -> Result<usize> {
    let path = &arguments.file;
    let mut length = None;
    reference_format::read(path, |record| {
        length = length.or(record.answer_trajectory_ids.first().map(Vec::len));
        Ok(())
    })?;
    length.filter(|&length| length > 0).ok_or_else(|| Error::file(path, "has no record with states"))
}

struct Import<'a> {
    arguments: &'a Arguments,
    tokenizer: Tokenizer,
    provenance: Provenance,
    /// Records of the response in hand.
    records: Vec<Record>,
    cut: usize,
    dropped: usize,
}

impl Import<'_> {
    /// The row of the records in hand. Cleaning there drops single blocks: the row ends before the first that is missing.
    fn take_row(&mut self) -> Result<Option<Trajectory>> {
        let mut records = std::mem::take(&mut self.records);
        let problem = |id: &str, message: &str| Error::file(&self.arguments.file, format!("data_id `{id}`: {message}"));
        if let Some(bad) = records.iter().find(|record| record.block().is_none()) {
            return Err(problem(&bad.data_id, "jacobian_itr_id is not of the form itr_0"));
        }
        records.sort_by_key(Record::block);
        let whole = records.iter().enumerate().take_while(|(index, record)| record.block() == Some(*index)).count();
        self.cut += usize::from(whole > 0 && whole < records.len());
        self.dropped += usize::from(whole == 0 && !records.is_empty());
        records.truncate(whole);
        let mut records = records.into_iter();
        let Some(first) = records.next() else { return Ok(None) };
        let prompt_ids = first.prompt_ids.flat();
        let mut row = Trajectory {
            sample_id: first.data_id,
            source: first.source.unwrap_or_else(|| self.arguments.source.clone()),
            prompt: match first.prompt {
                Some(prompt) => prompt,
                None => self.tokenizer.decode(&prompt_ids)?,
            },
            prompt_ids,
            response_ids: Vec::new(),
            reference: first.reference,
            blocks: Vec::new(),
            augmented: None,
            finish_reason: FinishReason::Length,
            meta: first.meta,
        };
        let complete = first.complete_teacher_output_ids.map(reference_format::Ids::flat);
        let states = std::iter::once(first.answer_trajectory_ids);
        for states in states.chain(records.map(|record| record.answer_trajectory_ids)) {
            let start = row.response_ids.len() as u32;
            let Some(fixed_point) = states.last() else { return Err(problem(&row.sample_id, "a block has no states")) };
            let end = fixed_point.iter().position(|id| self.provenance.eos_ids.contains(id));
            row.response_ids.extend(&fixed_point[..end.map_or(fixed_point.len(), |end| end + 1)]);
            row.blocks.push(Block { start, states });
            if end.is_some() {
                row.finish_reason = FinishReason::Eos;
                break;
            }
        }
        // An answer that hit the length limit inside its last block ends where the complete output does.
        let length = complete.map_or(usize::MAX, |complete| complete.len().saturating_sub(row.prompt_ids.len()));
        let last_start = row.blocks.last().map_or(0, |block| block.start as usize);
        if row.finish_reason == FinishReason::Length && length > last_start {
            row.response_ids.truncate(length);
        }
        match row.check(&self.provenance) {
            Ok(()) => Ok(Some(row)),
            Err(message) => Err(problem(&row.sample_id, &message)),
        }
    }
}
