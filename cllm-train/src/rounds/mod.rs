//! `rounds`: on-policy rounds of collection and training. A student's own trajectories show it the
//! states that it will meet when it decodes. As it gets faster, n may grow (Jacobi Forcing, arXiv
//! 2512.14681, trains a second round with twice the n).
//!
//! Each round has up to four stages: collect, augment, clean, train. `rounds.json` records which
//! are finished and what each was made from, so the same command resumes after any interruption.

mod report;
mod settings;
mod stage;

use std::path::PathBuf;

use cllm_core::chat_template::today;
use cllm_core::checkpoint::hub;
use cllm_core::distributed::ProcessEnv;
use cllm_core::progress::count;
use cllm_core::{Error, Result, atomic_file, interrupt, output_folder, progress};

use report::{REPORT_FILE, RoundsReport};
pub use settings::RoundsSettings;
use stage::{Stage, hand_on};

/// Runs the rounds, resuming from what the output folder holds. Returns the path of `rounds.json`.
///
/// # Errors
/// Errors of a stage; a finished stage whose inputs or output have changed since.
pub fn run(settings: &RoundsSettings) -> Result<PathBuf> {
    if ProcessEnv::from_env(|name| std::env::var(name).ok())?.is_some() {
        let message =
            "rounds run in a single process; to use several, alternate `cllm-data collect` and `cllm-train run`";
        return Err(Error::usage(message));
    }
    let _lock = output_folder::lock(&settings.output)?;
    output_folder::expect_own(&settings.output, || settings.output.join(REPORT_FILE).exists())?;
    atomic_file::recover(&settings.output)?;
    let mut model = hub::locate(&settings.model)?;
    let mut report = RoundsReport::read(&settings.output)?;
    let date = *report.date.get_or_insert_with(today);
    let mut rounds = Rounds { settings, report };
    for index in 0..settings.rounds.len() {
        let mut round = settings.round(index, &model)?;
        round.set_date(date);
        for stage in round.stages() {
            interrupt::check()?;
            rounds.run_stage(index, round.collect.n, &stage)?;
        }
        model = hand_on(&round.train)?;
        rounds.report.model = Some(model.clone());
    }
    rounds.report.complete = true;
    rounds.save()?;
    progress::log(format!("{} done; the model is in {}", count(settings.rounds.len(), "round"), model.display()));
    Ok(settings.output.join(REPORT_FILE))
}

struct Rounds<'s> {
    settings: &'s RoundsSettings,
    report: RoundsReport,
}

impl Rounds<'_> {
    /// Runs a stage of round `index` (from 0) unless it is finished.
    fn run_stage(&mut self, index: usize, n: usize, stage: &Stage<'_>) -> Result<()> {
        let (name, folder, inputs) = (stage.name(), stage.folder(), stage.inputs()?);
        let output = stage.output_fingerprint()?;
        if self.report.is_finished(index, name, &inputs, folder, output.as_deref())? {
            return Ok(());
        }
        progress::log(format!("round {}: {name}", index + 1));
        self.report.begin(index, n, name, inputs);
        self.save()?;
        // A kill between a stage's last file and its record leaves a stage that only has to be
        // recorded: run again, it finds that it is complete.
        let summary = stage.run()?;
        let output = stage
            .output_fingerprint()?
            .ok_or_else(|| Error::internal(format!("{} is incomplete after its stage", folder.display())))?;
        self.report.finish(index, name, output, summary);
        self.save()
    }

    fn save(&self) -> Result<()> {
        let output = &self.settings.output;
        std::fs::create_dir_all(output).map_err(Error::write(output))?;
        output_folder::save_settings(output, "cllm-train rounds", self.settings)?;
        self.report.write(output)
    }
}
