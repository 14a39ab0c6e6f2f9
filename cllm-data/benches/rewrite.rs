//! Time and memory that `augment` and `clean` take on generated trajectories:
//! `cargo bench -p cllm-data [-- MIB]`, with MIB of uncompressed states (default 1024). Memory is
//! shown if /usr/bin/time exists.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use cllm_core::fingerprint;
use cllm_core::tokenizer::Tokenizer;
use cllm_core::trajectory::{Block, FinishReason, Provenance, Reader, Trajectory, Writer};
use rand::RngExt;
use rayon::prelude::*;

// Modelled on a teacher's trajectories: responses of 256 tokens, in blocks of 16 with about as many
// states.
const N: usize = 16;
const NUM_BLOCKS: usize = 16;
const NUM_STATES: usize = 16;
const ROW_BYTES: usize = NUM_BLOCKS * NUM_STATES * N * size_of::<i32>();
const ROWS_PER_SHARD: usize = 1024;
const VOCAB_SIZE: i32 = 512;

fn row(index: usize, eos: i32) -> Trajectory {
    let mut rng = fingerprint::derive_rng(0, "bench", index as u64);
    let mut token = || loop {
        let id = rng.random_range(0..VOCAB_SIZE);
        if id != eos {
            break id;
        }
    };
    let mut response: Vec<i32> = (0..N * NUM_BLOCKS).map(|_| token()).collect();
    *response.last_mut().unwrap() = eos;
    let prompt_ids: Vec<i32> = (0..60).map(|_| token()).collect();
    let block = |(block_index, fixed_point): (usize, &[i32])| {
        // Each state has one more correct token; some of the wrong ones change.
        let mut state: Vec<i32> = (0..N).map(|_| token()).collect();
        let mut states = vec![state.clone()];
        for last_correct in 1..NUM_STATES - 1 {
            state[..=last_correct].copy_from_slice(&fixed_point[..=last_correct]);
            (last_correct + 1..N).step_by(3).for_each(|position| state[position] = token());
            states.push(state.clone());
        }
        states.push(fixed_point.to_vec());
        Block { start: (block_index * N) as u32, states }
    };
    Trajectory {
        sample_id: format!("bench-{index}"),
        source: "synthetic/train".into(),
        prompt: "A prompt of some sixty tokens.".repeat(6),
        prompt_ids,
        blocks: response.chunks(N).enumerate().map(block).collect(),
        response_ids: response,
        reference: Some("An answer.".into()),
        reference_ids: None,
        augmented: None,
        finish_reason: FinishReason::Eos,
        meta: None,
    }
}

fn write_data_set(folder: &Path, tokenizer: &Tokenizer, num_rows: usize) {
    let provenance = Provenance {
        teacher: "none".into(),
        teacher_name: None,
        teacher_base: None,
        tokenizer: tokenizer.fingerprint().to_owned(),
        vocab_size: VOCAB_SIZE as usize,
        n: N,
        max_new_tokens: N * NUM_BLOCKS,
        thought_closing: None,
        eos_ids: tokenizer.eos_ids().to_vec(),
        seed: 0,
        prompts: "none".into(),
        rendering: tokenizer.rendering_record(),
        toolkit: cllm_core::VERSION.to_owned(),
        steps: Vec::new(),
    };
    let eos = tokenizer.eos_ids()[0];
    let mut writer = Writer::create(folder, provenance).unwrap();
    for start in (0..num_rows).step_by(ROWS_PER_SHARD) {
        let indices = start..num_rows.min(start + ROWS_PER_SHARD);
        let shard: Vec<_> = indices.into_par_iter().map(|index| row(index, eos)).collect();
        writer.write_shard(&shard).unwrap();
    }
    writer.finish().unwrap();
}

fn main() {
    let mib = std::env::args().skip(1).find_map(|word| word.parse::<usize>().ok()).unwrap_or(1024);
    let model = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../configs/tiny-teacher");
    let dir = tempfile::tempdir().unwrap();
    let [raw, augmented, clean] = ["raw", "augmented", "clean"].map(|name| dir.path().join(name));
    write_data_set(&raw, &Tokenizer::load(&model).unwrap(), (mib << 20) / ROW_BYTES);
    let augment = format!("augment input={} output={}", raw.display(), augmented.display());
    let clean_verb =
        format!("clean input={} output={} model={}", augmented.display(), clean.display(), model.display());
    let program = env!("CARGO_BIN_EXE_cllm-data");
    let has_time = Path::new("/usr/bin/time").exists();
    for (name, arguments) in [("augment", augment), ("clean", clean_verb)] {
        let mut command = Command::new(if has_time { "/usr/bin/time" } else { program });
        if has_time {
            command.args(["-f", "  %U s user, %S s system, at most %M KiB of memory", program]);
        }
        let started = Instant::now();
        assert!(command.arg("--quiet").args(arguments.split(' ')).status().unwrap().success());
        let seconds = started.elapsed().as_secs_f64();
        println!("{name}: {mib} MiB of states in {seconds:.1} s, {:.0} MiB/s", mib as f64 / seconds);
    }
    println!("{} rows are left", Reader::open(&clean).unwrap().num_rows());
}
