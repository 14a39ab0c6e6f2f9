//! The training loop. Order, blocks and states are drawn from (seed, epoch, response), so that a resumed run goes on as if
//! it had never stopped.

use std::path::PathBuf;
use std::time::Instant;

use cllm_core::model::ModelConfig;
use cllm_core::progress::Progress;
use cllm_core::tokenizer::Tokenizer;
use cllm_core::{Error, Result, atomic_file, device, hub, interrupt, progress, torch_ext};
use serde::Serialize;
use serde_json::{Value, json};
use tch::Tensor;

use crate::checkpoint::{self, Origin, Position};
use crate::ema::{Ema, with_average};
use crate::examples::{self, Example};
use crate::metrics::Metrics;
use crate::optimizer::{State, learning_rate};
use crate::packing::Counts;
use crate::probe::Probe;
use crate::schedule::Schedule;
use crate::selection::Selection;
use crate::settings::{Init, Objective, Settings};
use crate::step::{Means, Models, weights};

/// Steps in a row without a finite gradient after which a run stops, once it logs.
const MOST_SKIPPED: usize = 20;

/// What a run did.
#[derive(Debug, Serialize)]
struct Summary {
    schema_version: u32,
    objective: Objective,
    parameters: i64,
    steps: usize,
    skipped_steps: usize,
    tokens: usize,
    blocks: usize,
    seconds: f64,
    tokens_per_second: f64,
    blocks_per_second: f64,
    final_losses: Value,
    /// Whether the run ended before its last step, for want of a new best.
    stopped_early: bool,
    /// Of the last probe.
    tokens_per_forward: Option<f64>,
    /// Of its finished answers alone.
    tokens_per_forward_finished: Option<f64>,
    /// Its answers that hit the length limit.
    unfinished: Option<usize>,
    /// Share of its answers that are right.
    accuracy: Option<f64>,
    /// The same of the model that the run started from.
    start_accuracy: Option<f64>,
    /// Step of the best probe, and its tokens per forward in finished answers.
    best_probe: Option<(usize, f64)>,
    peak_memory_bytes: Option<u64>,
    model: PathBuf,
}

struct Run<'t> {
    settings: Settings,
    folder: PathBuf,
    /// Folder whose tokenizer files go with every checkpoint.
    tokenizer_folder: PathBuf,
    models: Models,
    state: State,
    ema: Option<Ema>,
    position: Position,
    /// When this process began, and the seconds of training before it.
    started: (Instant, f64),
    probe: Option<Probe<'t>>,
}

/// Trains, or goes on with what the output folder holds.
pub fn run(settings: Settings) -> Result<()> {
    let place = device::parse(&settings.device)?;
    let folder = PathBuf::from(&settings.output);
    let (tokenizer, tokenizer_folder) = tokenizer(&settings)?;
    let models = Models::load(&settings, &tokenizer, &tokenizer_folder, place)?;
    let examples = examples::read(&settings, &tokenizer, models.student.config())?;
    let probe = Probe::of(&settings, &tokenizer, models.student.config())?;
    let origin = Origin::of(&settings, &tokenizer, &tokenizer_folder)?;
    std::fs::create_dir_all(&folder).map_err(Error::write(&folder))?;
    let mut state = State::new(&models.student);
    let ema = Ema::new(settings.optimizer.ema, state.masters());
    let position = match checkpoint::resume(&folder, &mut state, ema.as_ref(), &origin)? {
        Some(position) => {
            progress::say(format!("going on after step {}", position.step));
            position
        }
        None => {
            let selection = Selection::default();
            Position { step: 0, tokens: 0, blocks: 0, skipped: 0, seconds: 0.0, selection, origin }
        }
    };
    atomic_file::write(&folder.join("config.yaml"), cllm_core::settings::to_yaml(&settings)?.as_bytes())?;
    torch_ext::reset_peak_memory(place);
    let started = (Instant::now(), position.seconds);
    Run { settings, folder, tokenizer_folder, models, state, ema, position, started, probe }.train(&examples)
}

impl Run<'_> {
    fn train(mut self, examples: &[Example]) -> Result<()> {
        let schedule = Schedule::new(examples, &self.settings)?;
        let total = schedule.steps();
        if self.is_over(total) && self.folder.join("summary.json").exists() {
            progress::say(format!(
                "done already, after {} steps; the model is in {}",
                self.position.step,
                self.folder.join("final").display()
            ));
            return Ok(());
        }
        if schedule.left_out > 0 {
            progress::say(format!(
                "{} responses of more than {} packed tokens are left out",
                schedule.left_out, self.settings.max_tokens
            ));
        }
        let mut metrics = Metrics::open(&self.folder, self.position.step, self.is_probed())?;
        // Of the model that the run starts from; or one that a signal cut short.
        if self.probe_if_due(total, &mut metrics)? {
            self.save()?;
        }
        let mut bar = Progress::new("train", self.position.step as u64, total as u64);
        let mut batches = (usize::MAX, Vec::new());
        while !self.is_over(total) {
            if interrupt::requested().is_some() {
                self.save()?;
                interrupt::check()?;
            }
            let (epoch, within) = schedule.place(self.position.step);
            if batches.0 != epoch {
                batches = (epoch, schedule.batches(epoch));
            }
            let first = within * self.settings.accumulation;
            let group = &batches.1[first..(first + self.settings.accumulation).min(batches.1.len())];
            let number = self.position.step + 1;
            let rate = learning_rate(&self.settings.optimizer, number, total);
            let (counts, means) = self.models.gradients(&self.settings, examples, group, epoch);
            let norm = self.state.step(&self.settings.optimizer, rate, number)?;
            if let Some(ema) = &mut self.ema {
                ema.update(self.state.masters(), number)?;
            }
            self.position.step = number;
            self.position.tokens += counts.tokens;
            self.position.blocks += counts.blocks;
            bar.advance(1);
            if number.is_multiple_of(self.settings.log_every) || number == total {
                let skipped_in_a_row = self.settle();
                let line = line(&means, counts, &self.settings, &self.position, rate, &norm);
                bar.message(format!("loss {:.4}", line["loss"].as_f64().unwrap_or(f64::NAN)));
                metrics.write(&line)?;
                if skipped_in_a_row >= MOST_SKIPPED {
                    return Err(self.no_good(format!("the gradient was not finite {skipped_in_a_row} steps in a row")));
                }
            }
            let best = self.probe_if_due(total, &mut metrics)?;
            let due = self.settings.save_every > 0 && number.is_multiple_of(self.settings.save_every);
            if number < total && (best || due) {
                self.save()?;
            }
        }
        bar.finish();
        self.save()?;
        self.finish(metrics.last_losses(), total)
    }

    fn is_over(&self, total: usize) -> bool {
        self.position.step >= total || self.position.selection.is_over(&self.settings.probe)
    }

    /// Whether the probe where the run stands was taken.
    fn is_probed(&self) -> bool {
        self.position.selection.probed == Some(self.position.step)
    }

    /// Probes where the run stands if that is a step to probe at; whether what was found is the best so far.
    fn probe_if_due(&mut self, total: usize, metrics: &mut Metrics) -> Result<bool> {
        let step = self.position.step;
        let due = step.is_multiple_of(self.settings.probe.every) || step == total;
        let Some(probe) = self.probe.as_ref().filter(|_| due && !self.is_probed()) else { return Ok(false) };
        let run = || probe.run(&self.models, &self.settings);
        let (found, mut line) = match with_average(self.ema.as_ref(), &self.models.student, run) {
            Err(stopped @ Error::Interrupted(_)) => {
                self.save()?;
                return Err(stopped);
            }
            other => other?,
        };
        line.insert("step".to_owned(), step.into());
        metrics.write(&line.into())?;
        Ok(self.position.selection.take(step, found, &self.settings.probe))
    }

    /// Waits for the device and brings the position up to date; steps skipped in a row up to the last.
    fn settle(&mut self) -> usize {
        let (skipped, in_a_row) = self.state.skipped();
        self.position.skipped = skipped;
        self.position.seconds = self.started.1 + self.started.0.elapsed().as_secs_f64();
        in_a_row
    }

    /// Saves a checkpoint; refuses to where the weights are no longer numbers, which nobody wants to go on from.
    fn save(&mut self) -> Result<()> {
        if !self.state.is_finite() {
            return Err(
                self.no_good(format!("after step {} there are weights that are not finite", self.position.step))
            );
        }
        self.settle();
        let Run { folder, models, tokenizer_folder, state, ema, position, settings, .. } = self;
        checkpoint::save(folder, &models.student, tokenizer_folder, (state, ema.as_ref()), position, settings)
    }

    fn no_good(&self, why: String) -> Error {
        let kept = match self.folder.join("checkpoints/latest").exists() {
            true => "the last checkpoint is kept, which is from before",
            false => "there is no checkpoint from before",
        };
        let advice = "lower optimizer.lr, or look at the model that the run starts from";
        Error::negative(format!("{}: {why}; {kept}: {advice}", self.folder.display()))
    }

    /// Writes the final model and the summary.
    fn finish(self, last: Value, total: usize) -> Result<()> {
        let target = self.folder.join("final");
        atomic_file::folder_with(&target, |folder| {
            let (model, ema) = (&self.models.student, self.ema.as_ref());
            checkpoint::save_model(folder, model, ema, &self.tokenizer_folder, &self.settings)
        })?;
        let position = &self.position;
        let Selection { start, last: probe, best, .. } = position.selection;
        let summary = Summary {
            schema_version: 1,
            objective: self.settings.objective,
            parameters: self.models.student.config().parameter_count(),
            steps: position.step,
            skipped_steps: position.skipped,
            tokens: position.tokens,
            blocks: position.blocks,
            seconds: position.seconds,
            tokens_per_second: position.tokens as f64 / position.seconds,
            blocks_per_second: position.blocks as f64 / position.seconds,
            final_losses: last,
            stopped_early: position.step < total,
            tokens_per_forward: probe.map(|found| found.tokens_per_forward),
            tokens_per_forward_finished: probe.and_then(|found| found.tokens_per_forward_finished),
            unfinished: probe.map(|found| found.unfinished),
            accuracy: probe.and_then(|found| found.accuracy),
            start_accuracy: start.and_then(|found| found.accuracy),
            best_probe: best,
            peak_memory_bytes: torch_ext::memory(self.models.student.device()).map(|(_, peak)| peak),
            model: target.clone(),
        };
        atomic_file::write_json(&self.folder.join("summary.json"), &summary)?;
        let early = match best {
            _ if position.step == total => String::new(),
            Some((step, _)) => format!(" of {total}, since no probe was better than that after step {step},"),
            None => format!(" of {total}, since no probe was good enough,"),
        };
        progress::say(format!(
            "{} steps{early} in {:.0} s; the model is in {}",
            position.step,
            position.seconds,
            target.display()
        ));
        Ok(())
    }
}

/// A line of metrics; here the losses and the norm are read from the device.
fn line(means: &Means, counts: Counts, settings: &Settings, position: &Position, rate: f64, norm: &Tensor) -> Value {
    let values = means.read();
    let loss: f64 = values.iter().zip(weights(settings)).map(|(value, weight)| value * weight).sum();
    json!({
        "step": position.step, "loss": loss, "ar_loss": values[0], "consistency_loss": values[1],
        "local_loss": values[2], "anchor_loss": values[3], "lr": rate, "grad_norm": norm.double_value(&[]),
        "tokens": position.tokens,
        "step_tokens": counts.tokens, "noisy_tokens": counts.noisy, "seconds": position.seconds,
        "tokens_per_second": position.tokens as f64 / position.seconds,
    })
}

/// The tokenizer of a run, and the folder of its files (which is the model's, unless the weights are random).
pub fn tokenizer(settings: &Settings) -> Result<(Tokenizer, PathBuf)> {
    let folder = match &settings.init {
        None => hub::locate(&settings.model)?,
        Some(init) => PathBuf::from(&init.tokenizer),
    };
    let tokenizer = Tokenizer::load(&folder)?;
    let ids = tokenizer.vocab_size();
    if let Some(id) = settings.eos_ids.iter().find(|&&id| id < 0 || id as usize >= ids) {
        return Err(Error::usage(format!("eos_ids: {id} is no token of {}, which has {ids}", folder.display())));
    }
    Ok((tokenizer.with_eos_ids(&settings.eos_ids), folder))
}

/// A Llama of the shape asked for.
pub fn random_config(init: &Init, tokenizer: &Tokenizer) -> Result<ModelConfig> {
    let config = json!({
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu",
        "vocab_size": tokenizer.vocab_size(), "hidden_size": init.hidden_size,
        "intermediate_size": init.intermediate_size, "num_hidden_layers": init.num_layers,
        "num_attention_heads": init.num_heads, "num_key_value_heads": init.num_kv_heads,
        "max_position_embeddings": init.max_positions, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "tie_word_embeddings": true, "eos_token_id": tokenizer.eos_ids(), "bos_token_id": null,
    });
    ModelConfig::from_json(&config).map_err(|message| Error::usage(format!("init: {message}")))
}
