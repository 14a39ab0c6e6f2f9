//! `export`: writes a data set as a JSON trajectory file of the reference implementation.

use std::path::PathBuf;

use clap::Args;
use cllm_core::program::Outcome;
use cllm_core::progress::{self, Progress, count};
use cllm_core::trajectory::{Block, Reader, Trajectory};
use cllm_core::{Error, Result, atomic_file, interrupt};

use crate::reference_format::{ExportedDataSet, Ids, Record};

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
    let data_set = ExportedDataSet { provenance: reader.provenance().clone(), shards: reader.shard_rows() };
    let mut num_records = 0;
    atomic_file::write_with(path, |file| {
        let io = |result: std::io::Result<()>| result.map_err(Error::write(path));
        io(file.write_all(b"["))?;
        for (index, row) in reader.rows().enumerate() {
            interrupt::check()?;
            let mut records = records_of(&row?, index as u32);
            if let (0, Some(first)) = (num_records, records.first_mut()) {
                first.data_set = Some(data_set.clone());
            }
            for record in records {
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

/// The trainer of the reference implementation draws one of the states before the fixed point. A
/// block that has only its fixed point has it twice here; no block has it twice otherwise.
fn states_for_training(states: &[Vec<i32>]) -> Vec<Vec<i32>> {
    match states {
        [only] => vec![only.clone(), only.clone()],
        _ => states.to_vec(),
    }
}

fn records_of(row: &Trajectory, position: u32) -> Vec<Record> {
    let complete = [row.prompt_ids.as_slice(), &row.response_ids].concat();
    let record = |(index, block): (usize, &Block)| {
        let before = &complete[..row.prompt_ids.len() + block.start as usize];
        let fixed_point = block.states.last().map_or(&[][..], Vec::as_slice);
        let is_first = index == 0;
        Record {
            data_id: row.sample_id.clone(),
            jacobian_itr_id: format!("itr_{index}"),
            prompt_ids_len: vec![row.prompt_ids.len()].into(),
            prompt_ids: Ids::from_batch_of_one(before),
            answer_trajectory_ids: states_for_training(&block.states),
            teacher_output_ids: Ids::from_batch_of_one(&[before, fixed_point].concat()),
            complete_teacher_output_ids: Some(Ids::from_list(&complete)),
            source: is_first.then(|| row.source.clone()),
            prompt: is_first.then(|| row.prompt.clone()),
            reference: row.reference.clone().filter(|_| is_first),
            reference_ids: row.reference_ids.clone().filter(|_| is_first),
            meta: row.meta.clone().filter(|_| is_first),
            augmented: row.augmented.as_ref().and_then(|flags| flags.get(index).cloned()),
            row: Some(position),
            data_set: None,
        }
    };
    row.blocks.iter().enumerate().map(record).collect()
}
