//! `import`: reads a JSON trajectory file of the reference implementation into a data set.
//!
//! The file has one record per block, in any order. The reference implementation cleans block by
//! block, so a response may lack some of its blocks: its row ends before the first one that is
//! missing. A file that `export` wrote also says what the data set was: it comes back the same.

use std::path::{Path, PathBuf};

use clap::Args;
use cllm_core::chat_template::RenderingRecord;
use cllm_core::checkpoint::{self, hub};
use cllm_core::program::Outcome;
use cllm_core::progress::{self, count};
use cllm_core::tokenizer::Tokenizer;
use cllm_core::trajectory::{Block, FinishReason, Provenance, Trajectory, Writer};
use cllm_core::{Error, Result, fingerprint, interrupt, output_folder};

use crate::dataset_card::finish_with_card;
use crate::record_store::RecordStore;
use crate::reference_format::{self, ExportedDataSet, Ids, Record};

const ROWS_PER_SHARD: usize = 1024;
const MAX_NEW_TOKENS: usize = 512;

#[derive(Args)]
pub(crate) struct Arguments {
    /// The JSON file.
    file: PathBuf,
    /// Folder of the data set to write.
    #[arg(long, short)]
    output: PathBuf,
    /// The teacher: a folder, or an id in the Hugging Face cache. A file that `export` wrote needs
    /// none.
    #[arg(long)]
    model: Option<String>,
    /// Benchmark and split of rows for which the file names none.
    #[arg(long, default_value = "jsonl/imported")]
    source: String,
    /// Maximum number of tokens in a response when it was collected (`max_new_seq_len`). A file
    /// that `export` wrote says it; for others it is 512.
    #[arg(long)]
    max_new_tokens: Option<usize>,
}

/// Writes the data set.
///
/// # Errors
/// When the file has another format, or a row breaks a guarantee of the data format.
pub(crate) fn run(arguments: &Arguments) -> Result<Outcome> {
    let (path, output) = (&arguments.file, &arguments.output);
    let _lock = output_folder::lock(output)?;
    let teacher = arguments.model.as_deref().map(Teacher::load).transpose()?;
    let store = RecordStore::create(path)?;
    let contents = Contents::read(path, &store)?;
    let provenance = provenance(arguments, &contents, teacher.as_ref())?;
    let mut shards = Shards {
        writer: Writer::create(output, provenance.clone())?,
        rows: Vec::new(),
        num_rows: contents.data_set.map_or_else(Vec::new, |data_set| data_set.shards).into_iter(),
    };
    let tokenizer = teacher.map(|teacher| teacher.tokenizer);
    let mut importer =
        Importer { file: path, source: &arguments.source, tokenizer, provenance, num_truncated: 0, num_dropped: 0 };
    let mut shard_size = shards.next_size();
    store.for_each_response(|records| {
        interrupt::check()?;
        shards.rows.extend(importer.join(records)?);
        if shards.rows.len() == shard_size {
            shards.write()?;
            shard_size = shards.next_size();
        }
        Ok(())
    })?;
    if !shards.rows.is_empty() {
        shards.write()?;
    }
    let num_rows = finish_with_card(shards.writer)?;
    progress::log(format!(
        "{} in {}; {} truncated before a missing block, {} dropped because the first block is missing",
        count(num_rows, "row"),
        output.display(),
        importer.num_truncated,
        importer.num_dropped
    ));
    Ok(Outcome::Done)
}

/// The model that `--model` names.
struct Teacher {
    fingerprint: String,
    name: String,
    base: Option<String>,
    tokenizer: Tokenizer,
    vocab_size: usize,
}

impl Teacher {
    fn load(name: &str) -> Result<Self> {
        let folder = hub::locate(name)?;
        Ok(Teacher {
            fingerprint: checkpoint::fingerprint(&folder)?,
            name: hub::name(&folder),
            base: hub::fine_tuned_from(&folder),
            tokenizer: Tokenizer::load(&folder)?,
            vocab_size: checkpoint::load_config(&folder)?.vocab_size as usize,
        })
    }
}

/// What a file says about all of its records.
struct Contents {
    /// `None` for a file that `export` did not write.
    data_set: Option<ExportedDataSet>,
    /// Length of the first state.
    n: usize,
}

impl Contents {
    /// Reads the file into `store`.
    fn read(path: &Path, store: &RecordStore) -> Result<Self> {
        let (mut data_set, mut n) = (None, None);
        reference_format::read(path, |mut record| {
            interrupt::check()?;
            n = n.or(record.answer_trajectory_ids.first().map(Vec::len));
            if let Some(found) = record.data_set.take()
                && *data_set.get_or_insert(found.clone()) != found
            {
                let message = "holds the records of several data sets: export and import each of them alone";
                return Err(Error::file(path, message));
            }
            store.add(&record)
        })?;
        let n = n.filter(|&n| n > 0).ok_or_else(|| Error::file(path, "has no record with states"))?;
        Ok(Contents { data_set, n })
    }
}

fn provenance(arguments: &Arguments, contents: &Contents, teacher: Option<&Teacher>) -> Result<Provenance> {
    let (path, max_new_tokens) = (&arguments.file, arguments.max_new_tokens);
    if let Some(ExportedDataSet { provenance, .. }) = &contents.data_set {
        if let Some(problem) = provenance.problem() {
            return Err(Error::file(path, format!("its data_set {problem}; export it again")));
        }
        if teacher.is_some_and(|teacher| teacher.fingerprint != provenance.teacher) {
            return Err(Error::file(
                path,
                "was exported from the data set of another teacher than --model: leave it out",
            ));
        }
        if let Some(given) = max_new_tokens.filter(|&given| given != provenance.max_new_tokens) {
            let message = format!("was collected with {} tokens, not {given}", provenance.max_new_tokens);
            return Err(Error::file(path, format!("{message}: leave --max-new-tokens out")));
        }
        return Ok(provenance.clone());
    }
    let teacher =
        teacher.ok_or_else(|| Error::file(path, "does not say which teacher collected it: name it with --model"))?;
    Ok(Provenance {
        teacher: teacher.fingerprint.clone(),
        teacher_name: Some(teacher.name.clone()),
        teacher_base: teacher.base.clone(),
        tokenizer: teacher.tokenizer.fingerprint().to_owned(),
        vocab_size: teacher.vocab_size,
        n: contents.n,
        max_new_tokens: max_new_tokens.unwrap_or(MAX_NEW_TOKENS),
        thought_closing: None,
        eos_ids: teacher.tokenizer.eos_ids().to_vec(),
        seed: 0,
        prompts: fingerprint::hash_contents(path)?,
        rendering: RenderingRecord::default(),
        toolkit: cllm_core::VERSION.to_owned(),
        steps: vec!["import: a file of the reference implementation".to_owned()],
    })
}

/// Writes rows in shards of the sizes that the exported data set had.
struct Shards {
    writer: Writer,
    /// Rows of the next shard.
    rows: Vec<Trajectory>,
    /// Number of rows of each shard that has not begun.
    num_rows: std::vec::IntoIter<usize>,
}

impl Shards {
    fn next_size(&mut self) -> usize {
        self.num_rows.next().filter(|&size| size > 0).unwrap_or(ROWS_PER_SHARD)
    }

    fn write(&mut self) -> Result<()> {
        self.writer.write_shard(&self.rows)?;
        self.rows.clear();
        Ok(())
    }
}

/// Joins the records of a response into its row.
struct Importer<'a> {
    file: &'a Path,
    /// Source of rows whose record names none.
    source: &'a str,
    /// Decodes prompts that the file holds as tokens only.
    tokenizer: Option<Tokenizer>,
    provenance: Provenance,
    /// Number of rows that end before a missing block.
    num_truncated: usize,
    /// Number of responses without a first block, which have no row.
    num_dropped: usize,
}

impl Importer<'_> {
    fn join(&mut self, records: Vec<Record>) -> Result<Option<Trajectory>> {
        let mut records = self.leading_blocks(records)?;
        let Some(first) = records.first_mut() else { return Ok(None) };
        let prompt_ids = first.prompt_ids.flatten();
        let mut row = Trajectory {
            sample_id: first.data_id.clone(),
            source: first.source.take().unwrap_or_else(|| self.source.to_owned()),
            prompt: first.prompt.take().map_or_else(|| self.decode(&prompt_ids), Ok)?,
            prompt_ids,
            response_ids: Vec::new(),
            reference: first.reference.take(),
            reference_ids: first.reference_ids.take(),
            blocks: Vec::new(),
            augmented: None,
            finish_reason: FinishReason::Length,
            meta: first.meta.take(),
        };
        row.response_ids = self.response(&row, &records)?;
        if row.response_ids.last().is_some_and(|last| self.provenance.eos_ids.contains(last)) {
            row.finish_reason = FinishReason::Eos;
        }
        append_blocks(&mut row, records);
        match row.check(&self.provenance) {
            Ok(()) => Ok(Some(row)),
            Err(message) => Err(self.error(&row.sample_id, &message)),
        }
    }

    fn decode(&self, prompt_ids: &[i32]) -> Result<String> {
        let missing = || Error::file(self.file, "has prompts as tokens only: name the teacher with --model");
        self.tokenizer.as_ref().ok_or_else(missing)?.decode(prompt_ids)
    }

    /// Removes the records after the first missing block.
    fn leading_blocks(&mut self, mut records: Vec<Record>) -> Result<Vec<Record>> {
        let is_twice = |pair: &&[Record]| pair[0].block_index() == pair[1].block_index();
        if let Some([twice, _]) = records.windows(2).find(is_twice) {
            let message = format!("has two records {}: give the responses different ids", twice.jacobian_itr_id);
            return Err(self.error(&twice.data_id, &message));
        }
        let is_next = |(index, record): &(usize, &Record)| record.block_index() == Some(*index);
        let num_leading = records.iter().enumerate().take_while(is_next).count();
        self.num_truncated += usize::from(num_leading > 0 && num_leading < records.len());
        self.num_dropped += usize::from(num_leading == 0);
        records.truncate(num_leading);
        Ok(records)
    }

    /// The tokens after the prompt, through EOS or the length limit. The fixed point of the last
    /// block goes on after the limit with tokens that nothing has verified: they are not in the
    /// complete output, and an EOS among them ends nothing.
    fn response(&self, row: &Trajectory, records: &[Record]) -> Result<Vec<i32>> {
        let Some(last) = records.last() else { return Ok(Vec::new()) };
        let mut sequence = last.prompt_ids.flatten();
        sequence.extend(last.answer_trajectory_ids.last().into_iter().flatten());
        let Some(mut response) = sequence.strip_prefix(&row.prompt_ids[..]) else {
            let message = format!("prompt_ids of {} do not begin with those of itr_0", last.jacobian_itr_id);
            return Err(self.error(&row.sample_id, &message));
        };
        let complete = last.complete_teacher_output_ids.as_ref().map(Ids::flatten);
        let max_new_tokens = self.provenance.max_new_tokens;
        let num_too_many = response.len().saturating_sub(max_new_tokens);
        // The reference implementation decodes whole blocks: the last may reach over the limit.
        let limit = if num_too_many < self.provenance.n { max_new_tokens } else { usize::MAX };
        let length = complete.map_or(limit, |complete| complete.len().saturating_sub(row.prompt_ids.len()).min(limit));
        response = &response[..length.min(response.len())];
        let eos = response.iter().position(|id| self.provenance.eos_ids.contains(id));
        Ok(response[..eos.map_or(response.len(), |eos| eos + 1)].to_vec())
    }

    fn error(&self, data_id: &str, message: &str) -> Error {
        Error::file(self.file, format!("data_id `{data_id}`: {message}"))
    }
}

/// Appends the blocks that begin inside the response.
fn append_blocks(row: &mut Trajectory, records: Vec<Record>) {
    let is_augmented = records.iter().any(|record| record.augmented.is_some());
    let mut augmented = Vec::new();
    for mut record in records {
        // `export` writes a block's only state twice.
        let states = &mut record.answer_trajectory_ids;
        if states.len() == 2 && states[0] == states[1] {
            states.pop();
        }
        let start = record.prompt_ids.flatten().len().saturating_sub(row.prompt_ids.len());
        if start >= row.response_ids.len() {
            break;
        }
        augmented.push(record.augmented.unwrap_or_else(|| vec![false; record.answer_trajectory_ids.len()]));
        row.blocks.push(Block { start: start as u32, states: record.answer_trajectory_ids });
    }
    row.augmented = is_augmented.then_some(augmented);
}
