//! The training loop. Order, blocks and states are drawn from (seed, epoch, example), so a run that
//! resumes continues exactly as if it had never stopped.
//!
//! With several processes, each trains on some of the batches of every step, and the main one
//! writes.

use std::path::Path;
use std::rc::Rc;
use std::time::Instant;

use cllm_core::chat_template::{Date, today};
use cllm_core::cuda::libtorch;
use cllm_core::distributed::ProcessGroup;
use cllm_core::interrupt::SIGTERM;
use cllm_core::progress::{Progress, count};
use cllm_core::{Error, Result, checkpoint, interrupt, output_folder, progress};
use tch::Tensor;

use crate::checkpoint::{Checkpoints, Purpose};
use crate::data::batch::BatchCounts;
use crate::data::dataset::{self, Example};
use crate::data::division::RankShard;
use crate::data::loader::{BatchLoader, StepBatches};
use crate::data::schedule::Schedule;
use crate::metrics::{MetricsLog, StepMetrics};
use crate::models::{Models, load_config, load_tokenizer};
use crate::optimizer::{OptimizerState, learning_rate};
use crate::plan::refuse_what_cannot_fit;
use crate::processes;
use crate::run_fingerprint::RunFingerprint;
use crate::run_folder::{BEST, FINAL, checkpoints_folder, remove_state_of_run};
use crate::settings::Settings;
use crate::step::{StepOutput, train_step};
use crate::summary::Summary;
use crate::train_state::TrainState;
use crate::validation::Validator;

/// A run stops after this many steps in a row without a finite gradient. It checks this whenever it
/// writes metrics.
const MAX_SKIPPED_IN_A_ROW: usize = 20;

/// A training run, in one process.
struct Trainer<'t> {
    settings: Settings,
    group: Rc<ProcessGroup>,
    models: Models,
    optimizer: OptimizerState,
    checkpoints: Checkpoints,
    validator: Option<Validator<'t>>,
    /// `None` in processes other than the main one.
    metrics: Option<MetricsLog>,
    state: TrainState,
    /// Number of steps of the whole run.
    num_steps: usize,
    started: Instant,
    /// Seconds of training before this process started.
    seconds_before: f64,
    /// What the processes told each other in the last step: how many were asked to stop, and how
    /// many have written their part of the checkpoint in flight; float32 `[2]`.
    last_signals: Option<Tensor>,
    /// The last step after which a checkpoint to resume from was saved.
    saved_step: Option<usize>,
}

/// The command, as the saved settings name it.
const COMMAND: &str = "cllm-train run";

/// Trains, resuming from what the output folder holds.
///
/// # Errors
/// Bad settings and data; [`Error::Interrupted`] after a checkpoint; [`Error::Negative`] for
/// weights that are not finite.
pub fn run(settings: Settings) -> Result<()> {
    run_on(settings, today())
}

/// As [`run`], started on this date. A run that is resumed keeps the date on which it was started.
///
/// # Errors
/// As [`run`].
pub fn run_on(mut settings: Settings, today: Date) -> Result<()> {
    output_folder::expect_own(&settings.output, || output_folder::has_settings_of(&settings.output, COMMAND))?;
    let (device, group) = processes::join(&settings)?;
    let _lock = group.is_main().then(|| output_folder::lock(&settings.output)).transpose()?;
    if group.is_main() {
        Checkpoints::recover(&settings.output)?;
    }
    let date = settings.rendering.date.or(Checkpoints::started_on(&settings.output)).or(Some(today));
    // Processes may start on either side of midnight.
    settings.rendering.date = group.broadcast(date, device)?;
    let (tokenizer, tokenizer_folder) = load_tokenizer(&settings)?;
    // A date that no template prints is no part of the run.
    settings.rendering.date = tokenizer.rendering_record().date;
    let fingerprint = || RunFingerprint::for_training(&settings, &tokenizer, &tokenizer_folder);
    let checkpoints = Checkpoints::new(&settings, &tokenizer_folder)?;
    if let Some(state) = checkpoints.finished()? {
        checkpoints.check_fingerprint(&state, &fingerprint()?)?;
        // A process that was killed may have left some of it.
        if group.is_main()
            && !settings.keep_state
            && let Err(error) = remove_state_of_run(&settings.output)
        {
            progress::log(format!("its training state cannot be removed: {error}"));
        }
        let (steps, model) = (count(state.step, "step"), settings.output.join(FINAL));
        progress::log(format!("already complete: {steps}; the model is in {}", model.display()));
        ProcessGroup::leave(group);
        return Ok(());
    }
    let config = load_config(&settings, &tokenizer, &tokenizer_folder)?;
    let examples = dataset::read(&settings, &tokenizer, &config)?;
    let validator = Validator::load(&settings, &tokenizer, &config)?;
    let fingerprint = fingerprint()?;
    processes::refuse_differences(&fingerprint, (device, &group))?;
    checkpoints.check_newest(&fingerprint)?;
    if settings.model.is_some() {
        // Before memory is asked for, which a model without weights does not need.
        checkpoint::find_weights(&checkpoint::base_folder(&tokenizer_folder)?, &config)?;
    }
    let probe = validator.as_ref().and_then(Validator::probe_size);
    refuse_what_cannot_fit(&settings, (device, &group), &config, &examples, probe, &tokenizer_folder)?;
    let models = Models::load(&settings, &tokenizer, &tokenizer_folder, device)?;
    models.log_slow_path()?;
    let mut optimizer = OptimizerState::new(&models.student, &settings, Rc::clone(&group))?;
    if group.is_main() {
        std::fs::create_dir_all(&settings.output).map_err(Error::write(&settings.output))?;
    }
    group.barrier(device)?;
    let resumed = checkpoints.resume(&models.student, &mut optimizer, &fingerprint, &group)?;
    if group.is_main() {
        output_folder::save_settings(&settings.output, COMMAND, &settings)?;
    }
    libtorch::reset_peak_gpu_memory(device);
    let started = Instant::now();
    let schedule = Schedule::new(&examples, &settings)?;
    let state = resumed.unwrap_or_else(|| TrainState::initial(fingerprint));
    let run = settings.output.clone();
    let trainer = Trainer {
        group: Rc::clone(&group),
        models,
        optimizer,
        checkpoints,
        validator,
        metrics: None,
        num_steps: schedule.num_steps(),
        started,
        seconds_before: state.seconds,
        state,
        last_signals: None,
        saved_step: None,
        settings,
    };
    trainer.train(&examples, &schedule).map_err(|error| error.with_kept_work(kept_work(&run)))?;
    ProcessGroup::leave(group);
    Ok(())
}

/// What is kept of a run that a full disk ends.
fn kept_work(run: &Path) -> &'static str {
    match Checkpoints::has_latest(run) {
        true => "the last checkpoint is kept",
        false => "the run starts over, since there is no checkpoint",
    }
}

impl Trainer<'_> {
    fn train(mut self, examples: &[Example], schedule: &Schedule) -> Result<()> {
        if self.state.step > 0 {
            progress::log(format!("resuming after step {}", self.state.step));
        }
        if let Some(excluded) = schedule.exclusion() {
            progress::log(excluded);
        }
        let open = || MetricsLog::open(&self.settings, self.state.step, self.is_validated());
        self.metrics = self.group.is_main().then(open).transpose()?;
        // The validation of the initial model, or one that a signal interrupted, is due here. The
        // checkpoint of the interrupted one is what the run resumes from.
        if self.validate_if_due()? && !self.is_over() {
            self.save(Purpose::Resume)?;
        }
        let taken = self.take_steps(examples, schedule);
        if taken.is_err() && self.group.world_size() == 1 {
            // The checkpoint in flight is good, whatever happened since. Its own error matters less.
            let _ = self.wait_for_save();
        }
        taken?;
        self.finish()
    }

    fn take_steps(&mut self, examples: &[Example], schedule: &Schedule) -> Result<()> {
        let settings = self.settings.clone();
        let loader = BatchLoader::new(&settings, examples, &self.models.student)?;
        let mut bar = Progress::new("train", self.state.step as u64, self.num_steps as u64);
        std::thread::scope(|scope| {
            let batches = loader.load_ahead(scope, schedule, self.state.step, RankShard::for_process(&self.group));
            while !self.is_over() {
                let batches = batches.recv().map_err(|_| Error::internal("the thread that packs batches has ended"))?;
                self.take_step(&batches, &mut bar)?;
            }
            Ok::<_, Error>(())
        })?;
        bar.finish();
        Ok(())
    }

    /// Takes one step, then logs, validates and saves if that is due.
    fn take_step(&mut self, batches: &StepBatches, bar: &mut Progress) -> Result<()> {
        if let Some(signal) = self.exchange_signals()? {
            return self.interrupted(signal);
        }
        let number = self.state.step + 1;
        let lr = learning_rate(&self.settings.optimizer, number, self.num_steps);
        let output = train_step(&self.models, &mut self.optimizer, &self.settings, batches, number, lr)?;
        self.state.step = number;
        self.state.num_tokens += batches.counts.num_tokens;
        self.state.num_blocks += batches.counts.num_blocks;
        bar.advance(1);
        if number.is_multiple_of(self.settings.log_every) || number == self.num_steps {
            let step_metrics = self.log_step(&output, batches.counts, lr)?;
            bar.set_message(format!("loss {:.4}", step_metrics.loss));
            if let Some(metrics) = &mut self.metrics {
                metrics.write_step(&step_metrics)?;
            }
            self.check_progress()?;
        }
        let is_new_best = self.validate_if_due()?;
        match self.settings.saves_after(number) {
            _ if self.is_over() => Ok(()),
            true => self.save(Purpose::Resume),
            false if is_new_best => self.save(Purpose::KeepBest),
            false => Ok(()),
        }
    }

    /// Completes the checkpoint in flight if every process has written its part. Returns the signal
    /// that asks the run to stop, if any. A signal reaches the processes in different steps, so in
    /// each step they sum whether any of them got one. They read the sum of the step before, which
    /// needs no waiting.
    fn exchange_signals(&mut self) -> Result<Option<i32>> {
        let (own_signal, has_written) = (interrupt::requested(), self.checkpoints.has_written()?);
        let world_size = self.group.world_size();
        if world_size == 1 {
            if has_written {
                self.complete_save()?;
            }
            return Ok(own_signal);
        }
        let signals =
            Tensor::from_slice(&[own_signal.is_some(), has_written].map(|is_set| f32::from(u8::from(is_set))));
        let signals = signals.to_device(self.models.student.device());
        self.group.all_reduce(&signals)?;
        let Some(last_signals) = self.last_signals.replace(signals) else { return Ok(None) };
        let [num_stopping, num_written] = [0, 1].map(|index| last_signals.double_value(&[index]) as usize);
        if num_written == world_size {
            self.complete_save()?;
        }
        Ok((num_stopping > 0).then(|| own_signal.unwrap_or(SIGTERM)))
    }

    /// Saves a checkpoint, unless that was done after this step already, and fails with the signal.
    /// The first process that fails ends the others, so each waits until all have saved.
    fn interrupted<T>(&mut self, signal: i32) -> Result<T> {
        if self.saved_step != Some(self.state.step) {
            self.save(Purpose::Resume)?;
        }
        self.wait_for_save()?;
        Err(Error::Interrupted(signal))
    }

    fn complete_save(&mut self) -> Result<()> {
        self.checkpoints.complete(self.models.student.device(), &self.group)
    }

    fn wait_for_save(&mut self) -> Result<()> {
        self.checkpoints.wait(self.models.student.device(), &self.group)
    }

    fn is_over(&self) -> bool {
        self.state.step >= self.num_steps || self.state.validation.should_stop(&self.settings.validation)
    }

    /// Whether the last validation was after the last step.
    fn is_validated(&self) -> bool {
        self.state.validation.last_step == Some(self.state.step)
    }

    /// Validates if a validation is due after the last step. Returns whether it is the best so far.
    /// The main process validates and tells the others.
    fn validate_if_due(&mut self) -> Result<bool> {
        let step = self.state.step;
        let is_due = step.is_multiple_of(self.settings.validation.every) || step == self.num_steps;
        let Some(validator) = self.validator.as_ref().filter(|_| is_due && !self.is_validated()) else {
            return Ok(false);
        };
        let result = self.optimizer.with_average(|| {
            let Some(metrics) = &mut self.metrics else { return Ok(None) };
            let output = validator.run(&self.models, &self.settings)?;
            metrics.write_validation(step, &output, self.settings.loss_weights())?;
            Ok(output.generation)
        });
        let (signal, generation) = match result {
            Err(Error::Interrupted(signal)) => (Some(signal), None),
            other => (None, other?),
        };
        let (signal, generation) = self.group.broadcast((signal, generation), self.models.student.device())?;
        if let Some(signal) = signal {
            return self.interrupted(signal);
        }
        let is_new_best = self.state.validation.record(step, generation, &self.settings.validation);
        if let Some(metrics) = generation.filter(|_| self.group.is_main()) {
            let note = match is_new_best {
                _ if step == 0 => " (the initial model)",
                true => ", best so far",
                false => "",
            };
            progress::log(format!("step {step}: {}{note}", metrics.text()));
        }
        Ok(is_new_best)
    }

    /// Waits for the device and measures the step.
    fn log_step(&mut self, output: &StepOutput, counts: BatchCounts, lr: f64) -> Result<StepMetrics> {
        self.update_state();
        let losses = output.losses.read(&self.group)?;
        Ok(StepMetrics {
            step: self.state.step,
            loss: losses.weighted_sum(self.settings.loss_weights()),
            losses: losses.into(),
            lr,
            grad_norm: output.grad_norm.double_value(&[]),
            tokens: self.state.num_tokens,
            step_tokens: counts.num_tokens,
            noisy_tokens: counts.num_loss_tokens.global,
            seconds: self.state.seconds,
            tokens_per_second: self.state.num_tokens as f64 / self.state.seconds,
        })
    }

    /// Updates the parts of the state that are not counted in each step. Waits for the device.
    fn update_state(&mut self) {
        self.state.num_skipped_steps = self.optimizer.skipped_steps().total;
        self.state.seconds = self.seconds_before + self.started.elapsed().as_secs_f64();
    }

    /// # Errors
    /// [`Error::Negative`] if too many steps in a row were skipped.
    fn check_progress(&mut self) -> Result<()> {
        match self.optimizer.skipped_steps().in_a_row {
            in_a_row if in_a_row >= MAX_SKIPPED_IN_A_ROW => {
                Err(self.diverged(format!("the gradient was not finite {in_a_row} steps in a row")))
            }
            _ => Ok(()),
        }
    }

    /// Begins a checkpoint, unless the weights are no longer finite, since nobody wants to resume
    /// from those.
    fn save(&mut self, purpose: Purpose) -> Result<()> {
        self.check_finite()?;
        self.update_state();
        self.metrics.as_ref().map_or(Ok(()), MetricsLog::sync)?;
        let Trainer { models, optimizer, state, group, .. } = self;
        self.checkpoints.save(purpose, &models.student, optimizer, state, group)?;
        // They are about the checkpoint before.
        self.last_signals = None;
        if purpose == Purpose::Resume {
            self.saved_step = Some(self.state.step);
        }
        Ok(())
    }

    fn check_finite(&mut self) -> Result<()> {
        if self.optimizer.is_finite() {
            return Ok(());
        }
        Err(self.diverged(format!("the weights are not finite after step {}", self.state.step)))
    }

    fn diverged(&mut self, problem: String) -> Error {
        if let Err(error) = self.wait_for_save() {
            return error;
        }
        let kept = match Checkpoints::has_latest(&self.settings.output) {
            true => "the last checkpoint was saved before that and is kept",
            false => "there is no earlier checkpoint",
        };
        let advice = "lower optimizer.lr, or check the initial model";
        Error::negative(format!("{}: {problem}; {kept}: {advice}", self.settings.output.display()))
    }

    /// Writes the final model and the summary, and removes the training state unless it is to be
    /// kept.
    fn finish(mut self) -> Result<()> {
        self.check_finite()?;
        self.wait_for_save()?;
        self.update_state();
        let model = self.checkpoints.save_final(&self.models.student, &self.optimizer, &self.group)?;
        if self.settings.keep_state {
            self.save(Purpose::Resume)?;
            self.wait_for_save()?;
        }
        let Some(metrics) = &self.metrics else { return Ok(()) };
        metrics.sync()?;
        self.checkpoints.finish(&self.state)?;
        let student = &self.models.student;
        let state = &self.state;
        let summary = Summary {
            schema_version: 1,
            objective: self.settings.objective,
            parameters: student.config().num_parameters(),
            trained_parameters: self.settings.trained_parameters(student.config()),
            steps: state.step,
            skipped_steps: state.num_skipped_steps,
            tokens: state.num_tokens,
            blocks: state.num_blocks,
            seconds: state.seconds,
            tokens_per_second: state.num_tokens as f64 / state.seconds,
            blocks_per_second: state.num_blocks as f64 / state.seconds,
            final_losses: metrics.last_step_metrics().clone(),
            stopped_early: state.step < self.num_steps,
            validation: state.validation.into(),
            peak_memory_bytes: libtorch::gpu_memory(student.device()).map(|(_, peak)| peak),
            model: model.clone(),
        };
        summary.write(&self.settings.output)?;
        if !self.settings.keep_state {
            remove_state_of_run(&self.settings.output)?;
        }
        self.log_end(&model);
        Ok(())
    }

    fn log_end(&self, model: &Path) {
        let early = match self.state.validation.best {
            _ if self.state.step == self.num_steps => String::new(),
            Some(best) => {
                format!(" of {} (no validation was better than that after step {})", self.num_steps, best.step)
            }
            None => format!(" of {} (no validation was good enough)", self.num_steps),
        };
        let (steps, seconds) = (count(self.state.step, "step"), self.state.seconds);
        progress::log(format!("{steps}{early} in {seconds:.0} s; the model is in {}", model.display()));
        if let Some(best) = self.state.validation.best {
            let (step, speed) = (best.step, best.tokens_per_forward_finished);
            let folder = checkpoints_folder(&self.settings.output).join(BEST);
            progress::log(format!("best after step {step}: {speed:.2} tokens per forward, in {}", folder.display()));
        }
    }
}
