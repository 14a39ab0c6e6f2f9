//! The training loop. Order, blocks and states are drawn from (seed, epoch, response), so that a resumed run goes on as if
//! it had never stopped.

use std::path::PathBuf;
use std::rc::Rc;
use std::time::Instant;

use cllm_core::checkpoint::hub;
use cllm_core::checkpoint::is_adapter;
use cllm_core::cuda::libtorch;
use cllm_core::distributed::{ProcessEnv, ProcessGroup};
use cllm_core::interrupt::SIGTERM;
use cllm_core::model::ModelConfig;
use cllm_core::progress::Progress;
use cllm_core::tokenizer::Tokenizer;
use cllm_core::{Error, Result, atomic_file, device, interrupt, progress};
use serde::Serialize;
use serde_json::{Value, json};
use tch::{Device, Tensor};

use crate::checkpoint::{self, Origin, Position};
use crate::data::dataset::{self as examples, Example};
use crate::data::loader::{Packer, StepBatches};
use crate::data::packing::Counts;
use crate::data::schedule::Schedule;
use crate::metrics::Metrics;
use crate::optimizer::{State, learning_rate};
use crate::settings::{InitSettings, Objective, Settings};
use crate::step::{Models, weights};
use crate::validation::best_checkpoint::Selection;
use crate::validation::generation_probe::Probe;

/// Steps in a row without a finite gradient after which a run stops, once it logs.
const MOST_SKIPPED: usize = 20;

/// What a run did.
#[derive(Debug, Serialize)]
struct Summary {
    schema_version: u32,
    objective: Objective,
    parameters: i64,
    trained_parameters: i64,
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
    group: Rc<ProcessGroup>,
    folder: PathBuf,
    /// Folder whose tokenizer files go with every checkpoint.
    tokenizer_folder: PathBuf,
    models: Models,
    state: State,
    position: Position,
    /// When this process began, and the seconds of training before it.
    started: (Instant, f64),
    probe: Option<Probe<'t>>,
    /// Whether some process was asked to stop, as all of them hear in the step after.
    asked: Option<Tensor>,
}

/// Trains, or goes on with what the output folder holds. Of several processes each takes its batches of every step, and one
/// writes.
pub fn run(settings: Settings) -> Result<()> {
    let (place, group) = join(&settings)?;
    let folder = settings.output.clone();
    let (tokenizer, tokenizer_folder) = tokenizer(&settings)?;
    let models = Models::load(&settings, &tokenizer, &tokenizer_folder, place)?;
    let examples = examples::read(&settings, &tokenizer, models.student.config())?;
    let probe = Probe::of(&settings, &tokenizer, models.student.config())?;
    let origin = Origin::of(&settings, &tokenizer, &tokenizer_folder)?;
    let mut state = State::new(&models.student, &settings.optimizer, settings.seed, Rc::clone(&group))?;
    if group.is_main() {
        std::fs::create_dir_all(&folder).map_err(Error::write(&folder))?;
        checkpoint::recover(&folder)?;
    }
    group.barrier(place)?;
    let position = match checkpoint::resume(&folder, &mut state, &origin)? {
        Some(position) => {
            progress::log(format!("going on after step {}", position.step));
            position
        }
        None => {
            let selection = Selection::default();
            Position { step: 0, tokens: 0, blocks: 0, skipped: 0, seconds: 0.0, selection, origin }
        }
    };
    if group.is_main() {
        atomic_file::write(&folder.join("config.yaml"), cllm_core::settings::to_yaml(&settings)?.as_bytes())?;
    }
    libtorch::reset_peak_gpu_memory(place);
    let started = (Instant::now(), position.seconds);
    Run { settings, group, folder, tokenizer_folder, models, state, position, started, probe, asked: None }
        .train(&examples)
}

/// The device of this process, and the other processes, if there are any. Those that do not write show no progress.
pub fn join(settings: &Settings) -> Result<(Device, Rc<ProcessGroup>)> {
    let member = ProcessEnv::from_env(|name| std::env::var(name).ok())?;
    let place = device::for_process(&settings.device, member.as_ref())?;
    let group = match &member {
        Some(member) if settings.accumulation < member.world_size => {
            return Err(Error::usage(format!(
                "accumulation is {}, for {} processes: a step has at least one forward for each of them",
                settings.accumulation, member.world_size
            )));
        }
        Some(member) => ProcessGroup::join(member, place)?,
        None => ProcessGroup::single(),
    };
    if !group.is_main() {
        progress::set_quiet(true);
    }
    Ok((place, Rc::new(group)))
}

impl Run<'_> {
    fn train(mut self, examples: &[Example]) -> Result<()> {
        let schedule = Schedule::new(examples, &self.settings)?;
        let total = schedule.steps();
        if self.is_over(total) && self.folder.join("summary.json").exists() {
            progress::log(format!(
                "done already, after {} steps; the model is in {}",
                self.position.step,
                self.folder.join("final").display()
            ));
            return Ok(());
        }
        if schedule.left_out > 0 {
            progress::log(format!(
                "{} responses of more than {} packed tokens are left out",
                schedule.left_out, self.settings.max_example_tokens
            ));
        }
        let mut metrics = match self.group.is_main() {
            true => Some(Metrics::open(&self.folder, self.position.step, self.is_probed())?),
            false => None,
        };
        // Of the model that the run starts from; or one that a signal cut short.
        if self.probe_if_due(total, metrics.as_mut())? {
            self.save()?;
        }
        let (settings, config) = (self.settings.clone(), self.models.student.config().clone());
        let packer = Packer::new(&settings, examples, &config);
        let mut bar = Progress::new("train", self.position.step as u64, total as u64);
        std::thread::scope(|scope| {
            let share = (self.group.rank(), self.group.world_size());
            let batches = packer.ahead(scope, &schedule, self.position.step, share);
            while !self.is_over(total) {
                let batches = batches.recv().map_err(|_| Error::internal("the thread that packs batches has ended"))?;
                self.step(&batches, total, &mut bar, metrics.as_mut())?;
            }
            Ok::<_, Error>(())
        })?;
        bar.finish();
        self.save()?;
        self.finish(metrics.map(|metrics| metrics.last_losses()), total)
    }

    /// Takes one step, and what is due after it.
    fn step(
        &mut self,
        batches: &StepBatches,
        total: usize,
        bar: &mut Progress,
        mut metrics: Option<&mut Metrics>,
    ) -> Result<()> {
        if let Some(signal) = self.asked_to_stop()? {
            self.save()?;
            return Err(Error::Interrupted(signal));
        }
        let number = self.position.step + 1;
        let rate = learning_rate(&self.settings.optimizer, number, total);
        let means = self.models.gradients(&self.settings, batches)?;
        let norm = self.state.step(&self.settings.optimizer, rate, number)?;
        self.position.step = number;
        self.position.tokens += batches.counts.tokens;
        self.position.blocks += batches.counts.blocks;
        bar.advance(1);
        if number.is_multiple_of(self.settings.log_every) || number == total {
            let skipped_in_a_row = self.settle();
            let losses = means.read(&self.group)?;
            let line = line(losses, batches.counts, &self.settings, &self.position, rate, &norm);
            bar.set_message(format!("loss {:.4}", line["loss"].as_f64().unwrap_or(f64::NAN)));
            if let Some(metrics) = metrics.as_mut() {
                metrics.write(&line)?;
            }
            if skipped_in_a_row >= MOST_SKIPPED {
                return Err(self.no_good(format!("the gradient was not finite {skipped_in_a_row} steps in a row")));
            }
        }
        let best = self.probe_if_due(total, metrics)?;
        let due = self.settings.save_every.is_some_and(|every| number.is_multiple_of(every));
        if number < total && (best || due) { self.save() } else { Ok(()) }
    }

    /// The signal that asked to stop, if one did. Processes are not at the same place when one of them is signalled; so each
    /// step tells all whether anyone was, and all read what the step before told: nobody waits for it.
    fn asked_to_stop(&mut self) -> Result<Option<i32>> {
        let own = interrupt::requested();
        if self.group.world_size() == 1 {
            return Ok(own);
        }
        let asked = Tensor::from_slice(&[f32::from(u8::from(own.is_some()))]).to_device(self.models.student.device());
        self.group.all_reduce(&asked)?;
        let before = self.asked.replace(asked);
        let any = before.is_some_and(|before| before.double_value(&[0]) > 0.0);
        Ok(any.then(|| own.unwrap_or(SIGTERM)))
    }

    fn is_over(&self, total: usize) -> bool {
        self.position.step >= total || self.position.selection.is_over(&self.settings.validation)
    }

    /// Whether the probe where the run stands was taken.
    fn is_probed(&self) -> bool {
        self.position.selection.probed == Some(self.position.step)
    }

    /// Probes where the run stands if that is a step to probe at; whether what was found is the best so far. The process that
    /// writes probes, and tells the others.
    fn probe_if_due(&mut self, total: usize, metrics: Option<&mut Metrics>) -> Result<bool> {
        let step = self.position.step;
        let due = step.is_multiple_of(self.settings.validation.every) || step == total;
        let Some(probe) = self.probe.as_ref().filter(|_| due && !self.is_probed()) else { return Ok(false) };
        let run = || match metrics {
            Some(metrics) => {
                let (found, mut line) = probe.run(&self.models, &self.settings)?;
                line.insert("step".to_owned(), step.into());
                metrics.write(&line.into())?;
                Ok(found)
            }
            None => Ok(None),
        };
        let (stopped, found) = match self.state.with_average(run) {
            Err(Error::Interrupted(signal)) => (Some(signal), None),
            other => (None, other?),
        };
        // What the others take is the same.
        let (stopped, found) = self.group.broadcast((stopped, found), self.models.student.device())?;
        if let Some(signal) = stopped {
            self.save()?;
            return Err(Error::Interrupted(signal));
        }
        Ok(self.position.selection.take(step, found, &self.settings.validation))
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
        let Run { folder, models, tokenizer_folder, state, position, settings, group, .. } = self;
        checkpoint::save(folder, &models.student, tokenizer_folder, state, position, settings, group.is_main())
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
    fn finish(self, last: Option<Value>, total: usize) -> Result<()> {
        let target = self.folder.join("final");
        let Some(last) = last else { return self.state.with_average(|| Ok(())) };
        self.state.with_average(|| {
            atomic_file::write_folder_with(&target, |folder| {
                checkpoint::save_model(folder, &self.models.student, &self.tokenizer_folder, &self.settings)
            })
        })?;
        let position = &self.position;
        let Selection { start, last: probe, best, .. } = position.selection;
        let summary = Summary {
            schema_version: 1,
            objective: self.settings.objective,
            parameters: self.models.student.config().num_parameters(),
            trained_parameters: self.settings.trained_parameters(self.models.student.config()),
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
            peak_memory_bytes: libtorch::gpu_memory(self.models.student.device()).map(|(_, peak)| peak),
            model: target.clone(),
        };
        atomic_file::write_json(&self.folder.join("summary.json"), &summary)?;
        let early = match best {
            _ if position.step == total => String::new(),
            Some((step, _)) => format!(" of {total}, since no probe was better than that after step {step},"),
            None => format!(" of {total}, since no probe was good enough,"),
        };
        progress::log(format!(
            "{} steps{early} in {:.0} s; the model is in {}",
            position.step,
            position.seconds,
            target.display()
        ));
        Ok(())
    }
}

/// A line of metrics; here the norm is read from the device.
fn line(values: [f64; 4], counts: Counts, settings: &Settings, position: &Position, rate: f64, norm: &Tensor) -> Value {
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
        None => model_folder(settings)?,
        Some(init) => init.tokenizer.clone(),
    };
    let tokenizer = Tokenizer::load(&folder)?;
    let ids = tokenizer.vocab_size();
    if let Some(id) = settings.eos_ids.iter().flatten().find(|&&id| id < 0 || id as usize >= ids) {
        return Err(Error::usage(format!("eos_ids: {id} is no token of {}, which has {ids}", folder.display())));
    }
    Ok((tokenizer.with_eos_ids(settings.eos_ids.as_deref()), folder))
}

/// The folder of the model that a run starts from.
fn model_folder(settings: &Settings) -> Result<PathBuf> {
    let folder = hub::locate(settings.model.as_deref().unwrap_or_default())?;
    if settings.lora.is_some() && is_adapter(&folder) {
        let message = "is an adapter, which other adapters cannot belong to: merge it with `cllm-train export` first";
        return Err(Error::file(folder, message));
    }
    Ok(folder)
}

/// A Llama of the shape asked for.
pub fn random_config(init: &InitSettings, tokenizer: &Tokenizer) -> Result<ModelConfig> {
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
