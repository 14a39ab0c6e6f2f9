//! Trajectory data sets: round trips, the same bytes for the same rows, and files that must be
//! refused.

use std::ops::Range;
use std::path::Path;

use cllm_core::chat_template::RenderingRecord;
use cllm_core::thought::ThoughtClosing;
use cllm_core::trajectory::{Block, FinishReason, Provenance, Reader, RowChunk, Trajectory, Writer};

fn provenance() -> Provenance {
    Provenance {
        teacher: "t".into(),
        teacher_name: None,
        teacher_base: None,
        tokenizer: "k".into(),
        vocab_size: 100,
        n: 3,
        max_new_tokens: 8,
        thought_closing: None,
        eos_ids: vec![9],
        seed: 1,
        prompts: "p".into(),
        rendering: RenderingRecord::default(),
        toolkit: "0".into(),
        steps: vec![],
    }
}

fn row(index: i32) -> Trajectory {
    Trajectory {
        sample_id: format!("s{index}"),
        source: "synthetic/train".into(),
        prompt: "2+2?".into(),
        prompt_ids: vec![index % 90, 2],
        response_ids: vec![4, 5, 6, 9],
        reference: (index % 2 == 0).then(|| "4".into()),
        reference_ids: None,
        blocks: vec![
            Block { start: 0, states: vec![vec![4, 1, 2], vec![4, 5, 1], vec![4, 5, 6]] },
            Block { start: 3, states: vec![vec![9, 2, 2]] },
        ],
        augmented: (index % 3 == 0).then(|| vec![vec![false, true, false], vec![false]]),
        finish_reason: FinishReason::Eos,
        meta: None,
    }
}

/// Writes rows in shards of 300.
fn write(folder: &Path, rows: Range<i32>) {
    let mut writer = Writer::open(folder, provenance()).unwrap();
    for start in rows.clone().step_by(300) {
        writer.write_shard(&(start..(start + 300).min(rows.end)).map(row).collect::<Vec<_>>()).unwrap();
    }
    writer.finish().unwrap();
}

/// What pandas, pyarrow, Polars and DuckDB wrote when they were given the data set `own`.
#[test]
fn rows_that_other_tools_wrote_again_are_read() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/other-tools");
    let expected: Vec<Trajectory> = serde_json::from_slice(&std::fs::read(folder.join("rows.json")).unwrap()).unwrap();
    let mut num_opened = 0;
    for entry in std::fs::read_dir(&folder).unwrap() {
        let path = entry.unwrap().path();
        if !path.is_dir() && path.extension().is_none_or(|extension| extension != "parquet") {
            continue;
        }
        let reader = Reader::open(&path).unwrap_or_else(|error| panic!("{error}"));
        let rows: Vec<Trajectory> = reader.rows().map(|row| row.unwrap_or_else(|error| panic!("{error}"))).collect();
        let is_filtered = path.ends_with("pandas-filtered.parquet");
        let kept = expected.iter().filter(|row| !is_filtered || row.finish_reason == FinishReason::Length);
        assert_eq!(rows, kept.cloned().collect::<Vec<_>>(), "{}", path.display());
        assert_eq!(reader.provenance(), &Provenance { seed: 1, ..provenance() }, "{}", path.display());
        num_opened += 1;
    }
    assert_eq!(num_opened, 16);
}

#[test]
fn rows_without_metadata_need_the_manifest_beside_them() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/other-tools");
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("data/rows.parquet");
    std::fs::create_dir(dir.path().join("data")).unwrap();
    std::fs::copy(folder.join("pandas-filtered.parquet"), &file).unwrap();
    for path in [&file, dir.path()] {
        let message = Reader::open(path).err().unwrap().to_string();
        assert!(message.contains("copy the manifest.json"), "{message}");
    }
    std::fs::copy(folder.join("manifest.json"), dir.path().join("manifest.json")).unwrap();
    for path in [&file, dir.path()] {
        assert_eq!(Reader::open(path).unwrap().num_rows(), 1);
    }
    // Rows may be written again in place, too.
    std::fs::rename(&file, dir.path().join("data/part-00000.parquet")).unwrap();
    assert_eq!(Reader::open(dir.path()).unwrap().rows().count(), 1);
}

#[test]
fn shards_of_earlier_versions_stand_beside_the_manifest() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), 0..700);
    for index in 0..3 {
        let name = format!("part-{index:05}.parquet");
        std::fs::rename(dir.path().join("data").join(&name), dir.path().join(name)).unwrap();
    }
    let manifest = dir.path().join("manifest.json");
    let text = std::fs::read_to_string(&manifest).unwrap();
    std::fs::write(&manifest, text.replace("data/part", "part")).unwrap();
    assert_eq!(Reader::open(dir.path()).unwrap().rows().map(Result::unwrap).count(), 700);
}

#[test]
fn rows_come_back_in_order_and_pass_their_checks() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), 0..700);
    let reader = Reader::open(dir.path()).unwrap();
    assert_eq!((reader.num_rows(), reader.provenance()), (700, &provenance()));
    for (index, read) in reader.rows().enumerate() {
        let read = read.unwrap();
        assert_eq!(read, row(index as i32));
        read.check(&provenance()).unwrap();
    }
    assert_eq!(reader.rows().count(), 700);
}

#[test]
fn chunks_are_bounded_and_hold_every_row_once_in_order() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), 0..2500);
    let reader = Reader::open(dir.path()).unwrap();
    let chunks = reader.row_chunks();
    assert!(chunks.len() >= 3 && chunks.iter().all(|chunk| (1..=1024).contains(&chunk.num_rows())));
    let rows: Vec<Trajectory> = chunks.iter().flat_map(|chunk| reader.chunk_rows(chunk)).map(Result::unwrap).collect();
    assert!(rows == (0..2500).map(row).collect::<Vec<_>>());
}

#[test]
fn chunks_of_long_rows_hold_few_rows() {
    let long = |index: i32| {
        let states = vec![vec![4; 1 << 19]; 6];
        let response_ids = vec![4; 1 << 19];
        Trajectory {
            blocks: vec![Block { start: 0, states }],
            response_ids,
            finish_reason: FinishReason::Length,
            ..row(index)
        }
    };
    let provenance = Provenance { n: 1 << 19, max_new_tokens: 1 << 19, ..provenance() };
    let dir = tempfile::tempdir().unwrap();
    let mut writer = Writer::open(dir.path(), provenance).unwrap();
    writer.write_shard(&(1..6).map(long).collect::<Vec<_>>()).unwrap();
    writer.finish().unwrap();
    let chunks = Reader::open(dir.path()).unwrap().row_chunks();
    assert_eq!(chunks.iter().map(RowChunk::num_rows).collect::<Vec<_>>(), [2, 2, 1]);
}

#[test]
fn the_same_rows_give_the_same_bytes() {
    let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    write(a.path(), 0..50);
    write(b.path(), 0..50);
    let bytes = |dir: &Path| std::fs::read(dir.join("data/part-00000.parquet")).unwrap();
    assert_eq!(bytes(a.path()), bytes(b.path()));
    // A teacher with another name, such as in another folder, is the same teacher.
    let named = tempfile::tempdir().unwrap();
    let with_names = Provenance { teacher_name: Some("a".into()), teacher_base: Some("org/b".into()), ..provenance() };
    let mut writer = Writer::open(named.path(), with_names).unwrap();
    writer.write_shard(&(0..50).map(row).collect::<Vec<_>>()).unwrap();
    writer.finish().unwrap();
    assert_eq!(bytes(named.path()), bytes(a.path()));
    let fingerprint = |dir: &Path| cllm_core::trajectory::fingerprint(dir).unwrap();
    assert_eq!(fingerprint(named.path()), fingerprint(a.path()));
    assert_eq!(Reader::open(named.path()).unwrap().provenance().teacher_name.as_deref(), Some("a"));
}

#[test]
fn another_provenance_a_cut_shard_and_another_schema_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), 0..50);
    let open_error = |provenance| Writer::open(dir.path(), provenance).err().unwrap().to_string();
    let message = open_error(Provenance { seed: 2, ..provenance() });
    assert!(message.contains("was started with seed=1; this command says 2"), "{message}");
    let message = open_error(Provenance { teacher: "u".into(), ..provenance() });
    assert!(message.contains("was collected from another teacher"), "{message}");
    let shard = dir.path().join("data/part-00000.parquet");
    let bytes = std::fs::read(&shard).unwrap();
    std::fs::write(&shard, &bytes[..bytes.len() / 2]).unwrap();
    let message = Reader::open(dir.path()).err().unwrap().to_string();
    assert!(message.contains("part-00000.parquet") && message.contains("not a complete Parquet file"), "{message}");
    let text = dir.path().join("rows.parquet");
    std::fs::write(&text, "id,text\n").unwrap();
    assert!(Reader::open(&text).is_err());
}

#[test]
fn a_run_that_failed_before_its_first_row_leaves_no_data_set() {
    let dir = tempfile::tempdir().unwrap();
    Writer::open(dir.path(), provenance()).unwrap();
    let other = Provenance { seed: 2, ..provenance() };
    let mut writer = Writer::open(dir.path(), other.clone()).unwrap();
    assert_eq!(writer.manifest().provenance, other);
    writer.save_partial_rows(&[row(0)]).unwrap();
    assert!(Writer::open(dir.path(), provenance()).is_err());
}

#[test]
fn a_complete_data_set_stays_complete_until_a_shard_of_it_is_missing() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), 0..700);
    let writer = Writer::open(dir.path(), provenance()).unwrap();
    assert_eq!((writer.manifest().complete, writer.num_shards()), (true, 3));
    assert_eq!(Reader::open(dir.path()).unwrap().num_rows(), 700);
    std::fs::remove_file(dir.path().join("data/part-00002.parquet")).unwrap();
    let writer = Writer::open(dir.path(), provenance()).unwrap();
    assert_eq!((writer.manifest().complete, writer.num_shards()), (false, 2));
    assert!(Reader::open(dir.path()).err().unwrap().to_string().contains("is not complete"));
}

#[test]
fn tokens_that_closed_a_thought_stand_between_two_blocks_where_the_limit_is() {
    // The fixture's blocks have three tokens. The thought is closed after the first.
    let limited = |max_thinking_tokens: usize| Provenance {
        thought_closing: Some(ThoughtClosing { max_thinking_tokens, closing_ids: vec![6, 7] }),
        ..provenance()
    };
    let mut closed = row(0);
    let last = closed.response_ids.split_off(3);
    closed.response_ids.extend([6, 7].into_iter().chain(last));
    closed.blocks[1].start = 5;
    assert_eq!(closed.check(&limited(3)), Ok(()));
    assert_eq!((closed.forced_tokens(), closed.num_decoded_tokens()), (3..5, closed.response_ids.len() - 2));
    // The forward that confirmed the first block and opened the second now opens it after the closing.
    assert_eq!((closed.num_forwards(), row(0).num_forwards()), (4, 4));
    assert!(closed.check(&limited(6)).unwrap_err().contains("block 1 starts at 5, expected 3"));
    assert!(closed.check(&provenance()).unwrap_err().contains("block 1 starts at 5, expected 3"));
    let mut other = closed.clone();
    other.response_ids[4] = 4;
    assert!(other.check(&limited(3)).unwrap_err().contains("not the response"));
    // A row whose thought ended by itself has no such tokens.
    assert_eq!((row(0).check(&limited(3)), row(0).forced_tokens()), (Ok(()), 0..0));
    let json = serde_json::to_value(limited(3)).unwrap();
    assert_eq!((&json["max_thinking_tokens"], &json["closing_ids"]), (&3.into(), &serde_json::json!([6, 7])));
    assert_eq!(serde_json::from_value::<Provenance>(json).unwrap(), limited(3));
    let json = serde_json::to_value(provenance()).unwrap();
    assert_eq!(serde_json::from_value::<Provenance>(json).unwrap(), provenance());
}

#[test]
fn every_broken_guarantee_is_named() {
    let check = |change: fn(&mut Trajectory)| {
        let mut broken = row(0);
        change(&mut broken);
        broken.check(&provenance()).unwrap_err()
    };
    assert!(check(|row| row.blocks[0].states[1][0] = 1000).contains("outside the vocabulary"));
    assert!(check(|row| row.blocks[0].states[2][1] = 7).contains("not the response"));
    assert!(check(|row| row.blocks[1].start = 4).contains("block 1 starts at 4"));
    assert!(check(|row| row.finish_reason = FinishReason::Length).contains("finish_reason"));
    assert!(check(|row| row.augmented = Some(vec![])).contains("augmented"));
    let past_the_end = |row: &mut Trajectory| row.blocks.push(Block { start: 6, states: vec![vec![4, 4, 4]] });
    assert!(check(past_the_end).contains("block 2 starts at 6, past the response of 4 tokens"));
    let early_eos = |row: &mut Trajectory| {
        row.response_ids[1] = 9;
        row.blocks[0].states[2][1] = 9;
    };
    assert!(check(early_eos).contains("token 1 of the response is an EOS, but 2 follow"));
    let too_long = |row: &mut Trajectory| row.response_ids.extend([4; 5]);
    assert!(check(too_long).contains("has 9 tokens, but max_new_tokens was 8"));
}
