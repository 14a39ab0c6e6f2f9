//! Random weights in bfloat16, drawn while they are written.

use std::path::Path;

use cllm_core::checkpoint::{STREAMING_BYTES, TensorWriter, write_weights};
use cllm_core::model::ModelConfig;
use cllm_core::progress::Progress;
use cllm_core::{Result, interrupt};
use half::bf16;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use rayon::prelude::*;
use tch::{Device, Kind, Tensor};

/// As the published models were initialized, so that activations stay finite in every depth.
const STANDARD_DEVIATION: f64 = 0.02;
const ELEMENT_BYTES: usize = 2;
/// What is drawn before it is written.
const PIECE_BYTES: usize = 64 << 20;
/// What one thread draws at a time.
const CHUNK_BYTES: usize = 1 << 20;
/// Bytes of a word of the generator.
const WORD_BYTES: usize = 4;

/// Writes every weight of a model: normal matrices, norms of 1, biases of 0. The bytes depend on the
/// seed alone.
///
/// # Errors
/// File-system errors.
pub(super) fn write(config: &ModelConfig, seed: u64, folder: &Path) -> Result<()> {
    let shapes = config.parameter_shapes();
    let quantiles = normal_quantiles()?;
    let megabytes = |num_bytes: u64| num_bytes.div_ceil(1_000_000);
    let mut progress = Progress::new("init, MB", 0, megabytes(config.num_parameters() as u64 * ELEMENT_BYTES as u64));
    let mut writer = TensorWriter::new(Device::Cpu, STREAMING_BYTES);
    let mut piece = Vec::new();
    let mut written = 0;
    write_weights(&mut writer, folder, &shapes, Kind::BFloat16, |writer, index| {
        let (name, shape) = &shapes[index];
        let num_bytes = shape.iter().product::<i64>() as usize * ELEMENT_BYTES;
        for start in (0..num_bytes).step_by(PIECE_BYTES) {
            interrupt::check()?;
            piece.resize(PIECE_BYTES.min(num_bytes - start), 0);
            if name.ends_with("norm.weight") {
                fill(&mut piece, bf16::ONE);
            } else if name.ends_with(".bias") {
                fill(&mut piece, bf16::ZERO);
            } else {
                draw(&mut piece, start, &quantiles, seed, index as u64);
            }
            writer.write_bytes(&piece)?;
            let before = megabytes(written);
            written += piece.len() as u64;
            progress.advance(megabytes(written) - before);
        }
        Ok(())
    })?;
    writer.finish()?;
    progress.finish();
    Ok(())
}

fn fill(piece: &mut [u8], value: bf16) {
    piece.chunks_exact_mut(ELEMENT_BYTES).for_each(|element| element.copy_from_slice(&value.to_le_bytes()));
}

/// Draws a piece that begins at byte `start` of the tensor number `index`. Every chunk reads its own
/// part of the tensor's stream of random words, so chunks are drawn in parallel.
fn draw(piece: &mut [u8], start: usize, quantiles: &[bf16], seed: u64, index: u64) {
    piece.par_chunks_mut(CHUNK_BYTES).enumerate().for_each(|(number, chunk)| {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(index);
        rng.set_word_pos(((start + number * CHUNK_BYTES) / WORD_BYTES) as u128);
        rng.fill_bytes(chunk);
        for element in chunk.chunks_exact_mut(ELEMENT_BYTES) {
            let uniform = u16::from_le_bytes([element[0], element[1]]);
            element.copy_from_slice(&quantiles[usize::from(uniform)].to_le_bytes());
        }
    });
}

/// The normal number at each of 65,536 equal steps of the distribution: a table turns 16 random bits
/// into one, as finely as bfloat16 can tell.
fn normal_quantiles() -> Result<Vec<bf16>> {
    const COUNT: i64 = 1 << 16;
    let steps = Tensor::f_arange(COUNT, (Kind::Double, Device::Cpu))?;
    let probabilities = (steps + 0.5) / COUNT as f64;
    let normal: Tensor = (probabilities * 2.0 - 1.0).f_erfinv()? * (2f64.sqrt() * STANDARD_DEVIATION);
    Ok(Vec::<f64>::try_from(normal)?.into_iter().map(bf16::from_f64).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_piece_is_the_same_however_it_is_cut_and_is_normal() {
        let quantiles = normal_quantiles().unwrap();
        let mut whole = vec![0; 3 * CHUNK_BYTES];
        draw(&mut whole, 0, &quantiles, 7, 3);
        let mut part = vec![0; CHUNK_BYTES];
        draw(&mut part, CHUNK_BYTES, &quantiles, 7, 3);
        assert!(whole[CHUNK_BYTES..2 * CHUNK_BYTES] == part);
        for (seed, index) in [(8, 3), (7, 4)] {
            draw(&mut part, CHUNK_BYTES, &quantiles, seed, index);
            assert!(whole[CHUNK_BYTES..2 * CHUNK_BYTES] != part);
        }
        let numbers = whole.chunks_exact(2).map(|bytes| bf16::from_le_bytes([bytes[0], bytes[1]]).to_f64());
        let (mut sum, mut squares, mut within, count) = (0.0, 0.0, 0.0, whole.len() as f64 / 2.0);
        for number in numbers {
            sum += number;
            squares += number * number;
            within += f64::from(number.abs() < STANDARD_DEVIATION);
        }
        assert!((sum / count).abs() < 1e-4 && ((squares / count).sqrt() / STANDARD_DEVIATION - 1.0).abs() < 2e-3);
        assert!((within / count - 0.6827).abs() < 2e-3, "{}", within / count);
    }
}
