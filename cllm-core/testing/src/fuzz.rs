//! Feeds damaged and made-up inputs to code that reads what others wrote. No input may make it panic,
//! abort or hang; what it returns does not matter.

use std::any::Any;
use std::fs;
use std::io::{Write, stderr};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use cllm_core::fingerprint::derive_rng;
use rand::RngExt;
use rand::seq::IndexedRandom;
use rand_chacha::ChaCha8Rng;

/// Inputs of each target in the tests. `scripts/test --fuzz` sets `CLLM_FUZZ_SECONDS` instead.
const NUM_INPUTS: usize = 150;
/// An input must be done within this time for `CLLM_FUZZ_SECONDS`.
const MAX_INPUT_TIME: Duration = Duration::from_secs(10);
/// In the tests, whose machine may be slow and busy.
const MAX_INPUT_TIME_IN_TESTS: Duration = Duration::from_secs(120);
/// Numbers at the ends of their types, and just past them.
const NUMBERS: [&str; 14] = [
    "0",
    "-1",
    "1",
    "2147483647",
    "2147483648",
    "4294967295",
    "4294967296",
    "9223372036854775807",
    "18446744073709551615",
    "18446744073709551616",
    "1e999",
    "-1e308",
    "0.1",
    "null",
];
/// Texts that mean something to one parser or another.
const WORDS: [&str; 20] = [
    "\"", "{", "}", "[", "]", "{{", "}}", "{%", "%}", "\\u0000", "\\ud800", "\u{202e}", "\x1b[2J", "../", "```", "'",
    "--", "\n", "\0", "NaN",
];

/// Feeds inputs to `target`: the seeds, and then changed ones, which are drawn from the name and a random
/// seed: always the same one in the tests, a new one for `CLLM_FUZZ_SECONDS`, or that of
/// `CLLM_FUZZ_SEED`. A seed of inputs is a file, or all files of a folder.
///
/// # Panics
/// If the target panics; the message names the file with the input. A hang ends the process.
pub fn fuzz(name: &str, seeds: &[PathBuf], target: impl Fn(&[u8])) {
    let seeds: Vec<Vec<u8>> = seeds.iter().flat_map(|seed| files(seed)).map(|file| fs::read(file).unwrap()).collect();
    assert!(!seeds.is_empty(), "{name} has no seeds");
    let seconds = std::env::var("CLLM_FUZZ_SECONDS").ok().map(|text| text.parse().unwrap());
    let end = seconds.map(|seconds| Instant::now() + Duration::from_secs(seconds));
    let random_seed: u64 = match std::env::var("CLLM_FUZZ_SEED") {
        Ok(text) => text.parse().unwrap(),
        Err(_) => seconds.map_or(0, |_| rand::random()),
    };
    // Written before it is used: an input that aborts the process is found here.
    let file = std::env::temp_dir().join(format!("cllm-fuzz-{name}-{}", std::process::id()));
    let mut num_inputs = 0;
    let of_seed = move |name: &str, number: usize| format!("{name}, input {number} of CLLM_FUZZ_SEED={random_seed}");
    let max_time = if seconds.is_some() { MAX_INPUT_TIME } else { MAX_INPUT_TIME_IN_TESTS };
    let (begin, begun) = mpsc::channel();
    let (target_name, input_file) = (name.to_owned(), file.clone());
    let watchdog = thread::spawn(move || {
        let mut number = 0;
        loop {
            match begun.recv_timeout(max_time) {
                Ok(next) => number = next,
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => {
                    let input = of_seed(&target_name, number);
                    // `eprintln!` would be captured, and lost with the process.
                    let _ = writeln!(stderr(), "{input}, takes more than {max_time:?}: {}", input_file.display());
                    std::process::abort();
                }
            }
        }
    });
    loop {
        let mut rng = derive_rng(random_seed, name, num_inputs as u64);
        let input = match seeds.get(num_inputs) {
            Some(seed) => seed.clone(),
            None => changed(&seeds, &mut rng),
        };
        fs::write(&file, &input).unwrap();
        begin.send(num_inputs).unwrap();
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| target(&input))) {
            panic!("{}, panics on {}: {}", of_seed(name, num_inputs), file.display(), text_of(&*panic));
        }
        num_inputs += 1;
        if end.map_or(num_inputs >= NUM_INPUTS, |end| Instant::now() >= end) {
            break;
        }
    }
    drop(begin);
    watchdog.join().unwrap();
    fs::remove_file(&file).unwrap();
    println!("fuzz {name}: {num_inputs} inputs of CLLM_FUZZ_SEED={random_seed}");
}

fn files(seed: &Path) -> Vec<PathBuf> {
    if !seed.is_dir() {
        return vec![seed.to_owned()];
    }
    let mut files: Vec<PathBuf> = fs::read_dir(seed).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.retain(|file| file.is_file());
    files.sort();
    files
}

fn text_of(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().cloned();
    text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned())).unwrap_or_default()
}

/// A seed with one to four changes.
fn changed(seeds: &[Vec<u8>], rng: &mut ChaCha8Rng) -> Vec<u8> {
    let mut input = seeds.choose(rng).unwrap().clone();
    for _ in 0..rng.random_range(1..=4) {
        change(&mut input, seeds, rng);
    }
    input
}

fn change(input: &mut Vec<u8>, seeds: &[Vec<u8>], rng: &mut ChaCha8Rng) {
    let length = input.len();
    let at = rng.random_range(0..=length);
    let end = (at + rng.random_range(0..=64)).min(length);
    match rng.random_range(0..9) {
        0 if at < length => input[at] ^= 1 << rng.random_range(0..8),
        1 if at < length => input[at] = rng.random(),
        2 => input.truncate(at),
        3 => drop(input.drain(at..end)),
        // Many times over: what is nested or long.
        4 => {
            let piece = input[at..end].repeat(1 << rng.random_range(0..10));
            drop(input.splice(at..at, piece));
        }
        5 => {
            let other = seeds.choose(rng).unwrap();
            let from = rng.random_range(0..=other.len());
            drop(input.splice(at..end, other[from..].iter().copied().take(256)));
        }
        6 => replace_number(input, at, rng),
        7 => drop(input.splice(at..at, WORDS.choose(rng).unwrap().bytes())),
        _ => {
            let number: u64 = [0, 1, 1 << 31, 1 << 32, 1 << 63, u64::MAX][rng.random_range(0..6)];
            let bytes = number.to_le_bytes();
            drop(input.splice(at..(at + 8).min(length), bytes));
        }
    }
}

/// Replaces the first number in digits after a position.
fn replace_number(input: &mut Vec<u8>, at: usize, rng: &mut ChaCha8Rng) {
    let Some(start) = input[at..].iter().position(u8::is_ascii_digit).map(|start| at + start) else { return };
    let length = input[start..].iter().take_while(|byte| byte.is_ascii_digit()).count();
    drop(input.splice(start..start + length, NUMBERS.choose(rng).unwrap().bytes()));
}
