//! `augment`: replaces some of the wrong tokens of each state with the correct ones, never the
//! first wrong token (CLLM, arXiv 2403.00835, section 3.1).
//!
//! Real states are a correct prefix followed by wrong tokens. Correct tokens after a wrong one are
//! rare, and augmenting shows them to the student.

use std::path::PathBuf;

use cllm_core::progress::count;
use cllm_core::trajectory::{Block, Trajectory};
use cllm_core::{Result, fingerprint, progress, settings};
use garde::Validate;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::rewrite::Command;

#[derive(Debug, Clone, Serialize, Deserialize, Validate, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// The data set to augment.
    #[garde(custom(settings::required_path))]
    pub input: PathBuf,
    /// Folder of the augmented data set.
    #[garde(custom(settings::required_path))]
    pub output: PathBuf,
    /// Fraction of a state's wrong tokens, not counting the first, to correct.
    #[garde(range(min = 0.0, max = 1.0))]
    pub fraction: f64,
    /// Seed of the random choice of tokens.
    #[garde(skip)]
    pub seed: u64,
}

impl Default for Settings {
    fn default() -> Self {
        Settings { input: PathBuf::new(), output: PathBuf::new(), fraction: 0.5, seed: 0 }
    }
}

/// The result of `augment`, which `augment-report.json` holds and `--json` prints.
#[derive(Debug, Serialize, Deserialize)]
pub struct Summary {
    schema_version: u32,
    rows: usize,
    states_changed: usize,
}

/// Augments a data set, unless that is done already.
///
/// # Errors
/// When the input is not a complete data set, or the output cannot be written.
pub fn augment(settings: &Settings) -> Result<Summary> {
    let Settings { input, output, fraction, seed } = settings;
    let step = format!("augment: fraction {fraction}, seed {seed}");
    let command = Command { verb: "augment", settings, input, output, step };
    let Some(mut rewrite) = command.open()? else {
        let summary: Summary = command.read_report()?;
        progress::log(format!("already complete: {}, in {}", count(summary.rows, "row"), output.display()));
        return Ok(summary);
    };
    let mut summary = Summary { schema_version: 1, rows: 0, states_changed: 0 };
    let map = |row| Ok(augment_row(row, settings.fraction, settings.seed));
    rewrite.run(map, |rows| {
        summary.rows += rows.len();
        summary.states_changed += rows.iter().map(num_augmented).sum::<usize>();
        Ok(rows)
    })?;
    rewrite.finish(&summary)?;
    progress::log(format!(
        "augmented {} in {} of {}",
        count(summary.states_changed, "state"),
        count(summary.rows, "row"),
        settings.output.display()
    ));
    Ok(summary)
}

fn num_augmented(row: &Trajectory) -> usize {
    row.augmented.iter().flatten().flatten().filter(|&&flag| flag).count()
}

fn augment_row(mut row: Trajectory, fraction: f64, seed: u64) -> Trajectory {
    let mut augmented = Vec::with_capacity(row.blocks.len());
    for (index, block) in row.blocks.iter_mut().enumerate() {
        let mut rng = fingerprint::derive_rng(seed, &row.sample_id, index as u64);
        let mut flags = augment_block(block, fraction, &mut rng);
        // States that an earlier `augment` changed stay marked.
        let earlier = row.augmented.as_ref().and_then(|earlier| earlier.get(index));
        flags.iter_mut().zip(earlier.into_iter().flatten()).for_each(|(flag, earlier)| *flag |= earlier);
        augmented.push(flags);
    }
    row.augmented = Some(augmented);
    row
}

/// Corrects tokens in all states but the fixed point; returns for each state whether it changed.
fn augment_block(block: &mut Block, fraction: f64, rng: &mut ChaCha8Rng) -> Vec<bool> {
    let mut flags = vec![false; block.states.len()];
    let Some((fixed_point, states)) = block.states.split_last_mut() else { return flags };
    for (state, flag) in states.iter_mut().zip(&mut flags) {
        let wrong = (0..state.len()).filter(|&position| state[position] != fixed_point[position]);
        let mut corrected: Vec<usize> = wrong.skip(1).collect();
        corrected.shuffle(rng);
        corrected.truncate((corrected.len() as f64 * fraction).round() as usize);
        for &position in &corrected {
            state[position] = fixed_point[position];
        }
        *flag = !corrected.is_empty();
    }
    flags
}
