//! `export`: writes a data set as a JSON trajectory file of the reference implementation.

use std::io::Write;
use std::path::PathBuf;

use clap::Args;
use cllm_core::program::Outcome;
use cllm_core::progress::{self, Progress, count};
use cllm_core::trajectory::{Reader, Trajectory};
use cllm_core::{Error, Result, atomic_file, interrupt};

use crate::reference_format::{Ids, Record};

#[derive(Args)]
pub(crate) struct Arguments {
    /// Folder of the data set, or one of its shards.
    data: PathBuf,
    /// The JSON file to write.
    #[arg(long, short)]
    output: PathBuf,
}

/// Writes the file.
///
/// # Errors
/// When the data set cannot be read, or the file cannot be written.
pub(crate) fn run(arguments: &Arguments) -> Result<Outcome> {
    let path = &arguments.output;
    let reader = Reader::open(&arguments.data)?;
    let mut bar = Progress::new("rows", 0, reader.num_rows() as u64);
    let mut num_records = 0;
    atomic_file::write_with(path, |file| {
        let io = |result: std::io::Result<()>| result.map_err(Error::write(path));
        io(file.write_all(b"["))?;
        for row in reader.rows() {
            interrupt::check()?;
            for record in records_of(row?) {
                io(file.write_all(if num_records == 0 { b"\n" } else { b",\n" }))?;
                serde_json::to_writer(&mut *file, &record).map_err(|error| Error::write(path)(error.into()))?;
                num_records += 1;
            }
            bar.advance(1);
        }
        io(file.write_all(b"\n]\n"))
    })?;
    bar.finish();
    let (rows, records) = (count(reader.num_rows(), "row"), count(num_records, "record"));
    progress::log(format!("{rows} as {records} in {}", path.display()));
    Ok(Outcome::Done)
}

fn records_of(row: Trajectory) -> Vec<Record> {
    let complete = [row.prompt_ids.as_slice(), &row.response_ids].concat();
    let mut records = Vec::with_capacity(row.blocks.len());
    for (index, block) in row.blocks.into_iter().enumerate() {
        let mut prefix = [row.prompt_ids.as_slice(), &row.response_ids[..block.start as usize]].concat();
        let before = Ids::from_batch_of_one(&prefix);
        prefix.extend(block.states.last().into_iter().flatten());
        let is_first = index == 0;
        records.push(Record {
            data_id: row.sample_id.clone(),
            jacobian_itr_id: format!("itr_{index}"),
            prompt_ids_len: vec![row.prompt_ids.len()].into(),
            prompt_ids: before,
            answer_trajectory_ids: block.states,
            teacher_output_ids: Ids::from_batch_of_one(&prefix),
            complete_teacher_output_ids: Some(Ids::from_list(&complete)),
            source: is_first.then(|| row.source.clone()),
            prompt: is_first.then(|| row.prompt.clone()),
            reference: row.reference.clone().filter(|_| is_first),
            reference_ids: row.reference_ids.clone().filter(|_| is_first),
            meta: row.meta.clone().filter(|_| is_first),
        });
    }
    records
}
