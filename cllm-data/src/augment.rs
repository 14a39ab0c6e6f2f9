//! `augment`: corrects a random part of the wrong tokens of the states, never the first wrong one (CLLM, section 3.1).
//!
//! Real states look like "right right wrong wrong wrong"; islands of right tokens are rare, and the student should see them.

use std::path::PathBuf;

use cllm_core::program::{Outcome, print_json};
use cllm_core::trajectory::Trajectory;
use cllm_core::{Result, fingerprint, progress, settings};
use garde::Validate;
use rand::seq::SliceRandom;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::rewrite::{self as copying, Copying};

/// Settings of `augment`.
#[derive(Debug, Clone, Serialize, Deserialize, Validate, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// The data set.
    #[garde(custom(settings::required_path))]
    pub input: PathBuf,
    /// The folder to write.
    #[garde(custom(settings::required_path))]
    pub output: PathBuf,
    /// Share of a state's wrong tokens, its first aside, that is corrected.
    #[garde(range(min = 0.0, max = 1.0))]
    pub fraction: f64,
    /// Seed of the choice.
    #[garde(skip)]
    pub seed: u64,
}

impl Default for Settings {
    fn default() -> Self {
        Settings { input: PathBuf::new(), output: PathBuf::new(), fraction: 0.5, seed: 0 }
    }
}

/// Augments a data set.
///
/// # Errors
/// Bad data sets and folders.
pub fn run(settings: &Settings, json: bool) -> Result<Outcome> {
    let step = format!("augment: fraction {}, seed {}", settings.fraction, settings.seed);
    let mut copying = Copying::open(&settings.input, &settings.output, step)?;
    let mut changed = 0;
    let change = |row| Ok(augment(row, settings.fraction, settings.seed));
    copying.run(change, |rows| {
        let flags = rows.iter().flat_map(|row| row.augmented.iter().flatten().flatten());
        changed += flags.filter(|&&flag| flag).count();
        Ok(rows)
    })?;
    copying::save_settings(&settings.output, settings)?;
    let rows = copying::finish(copying.writer, &settings.output)?;
    if json {
        print_json(&json!({ "schema_version": 1, "rows": rows, "states_changed": changed }))?;
    }
    progress::log(format!("{rows} rows, {changed} states changed, in {}", settings.output.display()));
    Ok(Outcome::Done)
}

/// The row with corrected states; the fixed points stay as they are.
pub fn augment(mut row: Trajectory, fraction: f64, seed: u64) -> Trajectory {
    let mut flags = Vec::with_capacity(row.blocks.len());
    for (index, block) in row.blocks.iter_mut().enumerate() {
        let mut rng = fingerprint::derive_rng(seed, &row.sample_id, index as u64);
        let mut changed = vec![false; block.states.len()];
        if let Some((fixed_point, states)) = block.states.split_last_mut() {
            for (state, changed) in states.iter_mut().zip(&mut changed) {
                let wrong = (0..state.len()).filter(|&position| state[position] != fixed_point[position]);
                let mut wrong: Vec<usize> = wrong.skip(1).collect();
                wrong.shuffle(&mut rng);
                wrong.truncate((wrong.len() as f64 * fraction).round() as usize);
                for &position in &wrong {
                    state[position] = fixed_point[position];
                }
                *changed = !wrong.is_empty();
            }
        }
        // What an earlier augment changed stays marked.
        let before = row.augmented.as_ref().and_then(|before| before.get(index));
        changed.iter_mut().zip(before.into_iter().flatten()).for_each(|(changed, before)| *changed |= before);
        flags.push(changed);
    }
    row.augmented = Some(flags);
    row
}
