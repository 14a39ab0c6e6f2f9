//! How long `augment` and `clean` take, and how much memory, on made-up trajectories: `cargo bench -p cllm-data [-- MIB]`
//! of raw states, 1024 by default.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use cllm_core::fingerprint;
use cllm_core::tokenizer::Tokenizer;
use cllm_core::trajectory::{Block, FinishReason, Provenance, Reader, Trajectory, Writer};
use rand::RngExt;
use rayon::prelude::*;

/// As a teacher's blocks are: of 16 tokens, about as many states, answers of 256 tokens.
const N: usize = 16;
const BLOCKS: usize = 16;
const STATES: usize = 16;
const ROW_BYTES: usize = BLOCKS * STATES * N * size_of::<i32>();
const SHARD_ROWS: usize = 1024;
const VOCAB: i32 = 512;

fn row(index: usize, eos: i32) -> Trajectory {
    let mut rng = fingerprint::derive_rng(0, "bench", index as u64);
    let mut token = || loop {
        let id = rng.random_range(0..VOCAB);
        if id != eos {
            break id;
        }
    };
    let mut answer: Vec<i32> = (0..N * BLOCKS).map(|_| token()).collect();
    *answer.last_mut().unwrap() = eos;
    let prompt_ids: Vec<i32> = (0..60).map(|_| token()).collect();
    let block = |(number, fixed_point): (usize, &[i32])| {
        // One token more is right in each state; of the wrong ones some change.
        let mut state: Vec<i32> = (0..N).map(|_| token()).collect();
        let mut states = vec![state.clone()];
        for right in 1..STATES - 1 {
            state[..=right].copy_from_slice(&fixed_point[..=right]);
            (right + 1..N).step_by(3).for_each(|at| state[at] = token());
            states.push(state.clone());
        }
        states.push(fixed_point.to_vec());
        Block { start: (number * N) as u32, states }
    };
    Trajectory {
        sample_id: format!("bench-{index}"),
        source: "synthetic/train".into(),
        prompt: "A prompt of some sixty tokens.".repeat(6),
        prompt_ids,
        blocks: answer.chunks(N).enumerate().map(block).collect(),
        response_ids: answer,
        reference: Some("An answer.".into()),
        augmented: None,
        finish_reason: FinishReason::Eos,
        meta: None,
    }
}

fn make(folder: &Path, tokenizer: &Tokenizer, rows: usize) {
    let provenance = Provenance {
        teacher: "none".into(),
        tokenizer: tokenizer.fingerprint().to_owned(),
        vocab_size: VOCAB as usize,
        n: N,
        max_new_tokens: N * BLOCKS,
        eos_ids: tokenizer.eos_ids().to_vec(),
        seed: 0,
        prompts: "none".into(),
        toolkit: cllm_core::VERSION.to_owned(),
        steps: Vec::new(),
    };
    let mut writer = Writer::create(folder, provenance).unwrap();
    for start in (0..rows).step_by(SHARD_ROWS) {
        let eos = tokenizer.eos_ids()[0];
        let shard: Vec<_> = (start..rows.min(start + SHARD_ROWS)).into_par_iter().map(|at| row(at, eos)).collect();
        writer.write_shard(&shard).unwrap();
    }
    writer.finish().unwrap();
}

fn main() {
    let mib = std::env::args().skip(1).find_map(|word| word.parse::<usize>().ok()).unwrap_or(1024);
    let model = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../configs/tiny-teacher");
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    make(&at("raw"), &Tokenizer::load(&model).unwrap(), (mib << 20) / ROW_BYTES);
    let augment = format!("augment input={} output={}", at("raw").display(), at("augmented").display());
    let (from, to) = (at("augmented"), at("clean"));
    let clean = format!("clean input={} output={} model={}", from.display(), to.display(), model.display());
    let timed = Path::new("/usr/bin/time").exists();
    for (name, arguments) in [("augment", augment), ("clean", clean)] {
        let program = env!("CARGO_BIN_EXE_cllm-data");
        let mut command = Command::new(if timed { "/usr/bin/time" } else { program });
        if timed {
            command.args(["-f", "  %U s user, %S s system, %M KiB at most in memory", program]);
        }
        let started = Instant::now();
        assert!(command.arg("--quiet").args(arguments.split(' ')).status().unwrap().success());
        let seconds = started.elapsed().as_secs_f64();
        println!("{name}: {mib} MiB of raw states in {seconds:.1} s, {:.0} MiB/s", mib as f64 / seconds);
    }
    println!("{} rows are left", Reader::open(&to).unwrap().len());
}
