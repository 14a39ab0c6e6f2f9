//! Checkpoints of a run: a Hugging Face folder (or an adapter alone) with the training state beside
//! it. A checkpoint appears whole or not at all, so that a run that was killed at any moment
//! resumes from the one before.
//!
//! `checkpoints/step-NNNNNN` are the folders; the links `latest` and `best` point to two of them.

use std::cell::OnceCell;
use std::path::{Path, PathBuf};

use cllm_core::atomic_file::{self, UnfinishedFolder};
use cllm_core::capacity::HostMemory;
use cllm_core::chat_template::Date;
use cllm_core::checkpoint::{self, STREAMING_BYTES, TensorWriter, WritingThread, hub};
use cllm_core::checksum::{self, WrittenFile};
use cllm_core::distributed::ProcessGroup;
use cllm_core::model::Transformer;
use cllm_core::{Error, Result, text_file, tokenizer};
use tch::{Device, Tensor};

use crate::custom_generate;
use crate::model_card::ModelCard;
use crate::optimizer::OptimizerState;
use crate::optimizer_files;
use crate::run_fingerprint::RunFingerprint;
use crate::run_folder::{
    BEST, FINAL, Kept, LATEST, STATE_FILE, checkpoints, checkpoints_folder, has_state, kept_checkpoints, read_state,
    remove_state, write_state,
};
use crate::settings::Settings;
use crate::summary::SUMMARY_FILE;
use crate::train_state::TrainState;

/// Where `best` points to if the final model is the best.
const FINAL_FROM_CHECKPOINTS: &str = "../final";

/// A checkpoint waits in host memory to be written if that much memory, in multiples of it, is
/// available.
const MIN_HOST_MEMORY_PER_SAVE: u64 = 4;

/// What a checkpoint is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// To resume from: it has the model and the training state.
    Resume,
    /// To keep the best model so far, without training state.
    KeepBest,
}

/// The folder in which a run saves its models, and what is saved with them.
pub struct Checkpoints {
    run: PathBuf,
    /// Folder with the tokenizer files that every saved model gets.
    tokenizer_folder: PathBuf,
    /// The model below adapters; `None` when every weight is trained.
    adapter_base: Option<String>,
    eos_ids: Option<Vec<i32>>,
    /// File of the chat template that replaces the model's own.
    chat_template: Option<PathBuf>,
    card: ModelCard,
    max_checkpoints: usize,
    /// Host memory that was available before the first checkpoint. It decides for the whole run
    /// whether checkpoints wait in memory: their pinned buffers are kept for the next one, which would
    /// find less.
    available_bytes: OnceCell<u64>,
    /// The checkpoint that is being written while training goes on. There is one at most.
    in_flight: Option<SaveInFlight>,
}

/// How far a checkpoint is that is not complete yet. If this process's files could not be written,
/// there is none: its folder is removed, and the checkpoint before it stays the latest.
enum SaveInFlight {
    /// The thread writes this process's files.
    Writing(UnfinishedCheckpoint, WritingThread),
    /// They are on disk. The other processes may still be writing theirs.
    Written(UnfinishedCheckpoint, Vec<WrittenFile>),
}

/// A checkpoint that has no name yet.
struct UnfinishedCheckpoint {
    purpose: Purpose,
    step: usize,
    best_step: Option<usize>,
    /// Where its files are, and where they will be.
    work: PathBuf,
    path: PathBuf,
    /// Of the main process.
    folder: Option<UnfinishedFolder>,
}

impl SaveInFlight {
    /// Waits until this process's files are on disk, and returns those that its thread wrote.
    fn join(self) -> Result<(UnfinishedCheckpoint, Vec<WrittenFile>)> {
        match self {
            SaveInFlight::Writing(checkpoint, thread) => match thread.wait() {
                Ok(written) => Ok((checkpoint, written)),
                Err(error) => Err(atomic_file::with_final_path(error, &checkpoint.work, &checkpoint.path)),
            },
            SaveInFlight::Written(checkpoint, written) => Ok((checkpoint, written)),
        }
    }
}

impl Checkpoints {
    /// The folder of a run whose model has its tokenizer files in `tokenizer_folder`.
    ///
    /// # Errors
    /// [`Error::Internal`] for settings that cannot be written.
    pub fn new(settings: &Settings, tokenizer_folder: &Path) -> Result<Self> {
        Ok(Checkpoints {
            run: settings.output.clone(),
            tokenizer_folder: tokenizer_folder.to_owned(),
            adapter_base: settings.lora.as_ref().and_then(|_| settings.model.clone()),
            eos_ids: settings.eos_ids.clone(),
            chat_template: settings.rendering.chat_template.clone(),
            card: ModelCard::of_run(settings, tokenizer_folder)?,
            max_checkpoints: settings.max_checkpoints,
            available_bytes: OnceCell::new(),
            in_flight: None,
        })
    }

    /// The date on which a run was started; `None` if its folder has no readable train state, which
    /// [`Checkpoints::resume`] reports.
    pub fn started_on(run: &Path) -> Option<Date> {
        let state = if run.join(SUMMARY_FILE).exists() { read_state(run, "") } else { Ok(None) };
        let state = state.ok()?.or_else(|| read_state(&newest(run).ok()??, "").ok()?);
        state?.fingerprint.date()
    }

    fn folder(&self) -> PathBuf {
        checkpoints_folder(&self.run)
    }

    /// Whether a run has a checkpoint to resume from.
    pub fn has_latest(run: &Path) -> bool {
        checkpoints_folder(run).join(LATEST).exists()
    }

    /// Begins a checkpoint, which [`Self::complete`] makes appear. Every process must call it: each
    /// writes its optimizer state, the main one the rest. Returns when everything is copied to host
    /// memory, if there is plenty of it, else when almost everything is written. A checkpoint that
    /// is still in flight is waited for.
    ///
    /// # Errors
    /// File-system errors, a process that has died; also for the checkpoint before.
    pub fn save(
        &mut self,
        purpose: Purpose,
        model: &Transformer,
        optimizer: &OptimizerState,
        state: &TrainState,
        group: &ProcessGroup,
    ) -> Result<()> {
        self.wait(model.device(), group)?;
        let path = self.folder().join(checkpoint_name(state.step));
        let folder = if group.is_main() { Some(UnfinishedFolder::create(&path)?) } else { None };
        let work = group.broadcast(folder.as_ref().map(|folder| folder.work().to_owned()), model.device())?;
        let work = work.ok_or_else(|| Error::internal("the main process began no checkpoint"))?;
        let thread = self
            .write_checkpoint(purpose, &work, model, optimizer, state, group)
            .map_err(|error| atomic_file::with_final_path(error, &work, &path))?;
        let best_step = state.validation.best.map(|best| best.step);
        let checkpoint = UnfinishedCheckpoint { purpose, step: state.step, best_step, work, path, folder };
        self.in_flight = Some(SaveInFlight::Writing(checkpoint, thread));
        Ok(())
    }

    fn write_checkpoint(
        &self,
        purpose: Purpose,
        folder: &Path,
        model: &Transformer,
        optimizer: &OptimizerState,
        state: &TrainState,
        group: &ProcessGroup,
    ) -> Result<WritingThread> {
        // An adapter is no model, and small.
        let skip_masters = optimizer.masters_are_saved_weights() && self.adapter_base.is_none();
        let model_bytes = buffer_bytes(optimizer.layout().buffer());
        let state_bytes = match purpose {
            Purpose::Resume => optimizer.shards().iter().map(|(_, shard)| buffer_bytes(shard)).sum(),
            Purpose::KeepBest => 0,
        };
        let num_bytes = model_bytes + state_bytes * group.world_size() as u64;
        let mut writer = TensorWriter::new(model.device(), self.host_bytes_of_save(num_bytes) as usize);
        if purpose == Purpose::Resume {
            optimizer_files::write(&mut writer, folder, optimizer, group, skip_masters)?;
        }
        optimizer.with_average(|| match &self.adapter_base {
            _ if !group.is_main() => Ok(()),
            Some(base) => self.write_adapter(&mut writer, folder, model, base),
            None => self.write_model(&mut writer, folder, model),
        })?;
        if group.is_main() && purpose == Purpose::Resume {
            write_state(folder, state)?;
        }
        writer.finish_in_background()
    }

    /// As [`host_bytes_of_save`], as the first checkpoint decided it.
    fn host_bytes_of_save(&self, num_bytes: u64) -> u64 {
        waiting_bytes(num_bytes, *self.available_bytes.get_or_init(available_bytes))
    }

    /// Whether this process has written its part of the checkpoint in flight; `false` if there is
    /// none.
    ///
    /// # Errors
    /// File-system errors that the thread met. There is no checkpoint in flight then.
    pub fn has_written(&mut self) -> Result<bool> {
        self.in_flight = match self.in_flight.take() {
            Some(SaveInFlight::Writing(checkpoint, thread)) if !thread.is_finished() => {
                Some(SaveInFlight::Writing(checkpoint, thread))
            }
            Some(save) => {
                let (checkpoint, written) = save.join()?;
                Some(SaveInFlight::Written(checkpoint, written))
            }
            None => None,
        };
        Ok(matches!(self.in_flight, Some(SaveInFlight::Written(..))))
    }

    /// Waits until the checkpoint in flight is complete, on all processes, if there is one. Every
    /// process must call it.
    ///
    /// # Errors
    /// File-system errors, a process that has died. There is no checkpoint in flight then.
    pub fn wait(&mut self, device: Device, group: &ProcessGroup) -> Result<()> {
        self.complete(device, group)?;
        group.barrier(device)
    }

    /// Makes the checkpoint in flight appear, if there is one, as soon as every process has written its
    /// part. Every process must call it.
    ///
    /// # Errors
    /// As [`Self::wait`].
    pub fn complete(&mut self, device: Device, group: &ProcessGroup) -> Result<()> {
        let Some(save) = self.in_flight.take() else { return Ok(()) };
        let (checkpoint, written) = save.join()?;
        let written = group.gather(written, device)?.concat();
        self.publish(checkpoint, &written)
    }

    /// Gives a checkpoint its name. Moves the links to it, `best` if it is the best so far, and
    /// `latest` if it is one to resume from, and removes old ones.
    fn publish(&self, checkpoint: UnfinishedCheckpoint, written: &[WrittenFile]) -> Result<()> {
        let UnfinishedCheckpoint { purpose, step, best_step, folder: Some(folder), .. } = checkpoint else {
            return Ok(());
        };
        folder.finish(written)?;
        let name = checkpoint_name(step);
        // `best` is moved first: a kill in between must not leave `latest` with a best checkpoint
        // that no link points to.
        if best_step == Some(step) {
            atomic_file::replace_link(&self.folder().join(BEST), &name)?;
        }
        if purpose == Purpose::Resume {
            atomic_file::replace_link(&self.folder().join(LATEST), &name)?;
        }
        self.remove_old(best_step)
    }

    /// Writes the final model, or the adapter alone if it acts on draft tokens alone, since it cannot
    /// be merged. Every process must call it; the main one writes.
    ///
    /// # Errors
    /// File-system errors, a process that has died.
    pub fn save_final(&self, model: &Transformer, optimizer: &OptimizerState, group: &ProcessGroup) -> Result<PathBuf> {
        let target = self.run.join(FINAL);
        optimizer.with_average(|| {
            if !group.is_main() {
                return Ok(());
            }
            atomic_file::write_folder_with(&target, |folder| {
                let mut writer = TensorWriter::new(model.device(), STREAMING_BYTES);
                match self.adapter_base.as_ref().filter(|_| model.adapts_drafts()) {
                    Some(base) => {
                        self.write_adapter(&mut writer, folder, model, base)?;
                    }
                    None => {
                        self.write_model(&mut writer, folder, model)?;
                        if self.card.has_custom_generate() {
                            custom_generate::write(folder)?;
                        }
                    }
                }
                self.card.write(folder)?;
                writer.finish().map(drop)
            })
        })?;
        Ok(target)
    }

    /// Writes a model with its tokenizer. Adapters are merged, and saved once more by themselves in
    /// `adapter`.
    fn write_model(&self, writer: &mut TensorWriter, folder: &Path, model: &Transformer) -> Result<()> {
        match &self.adapter_base {
            Some(base) if model.is_quantized() => {
                checkpoint::save_on_base_with(writer, model, &hub::locate(base)?, folder, model.kind())?;
            }
            _ => checkpoint::save_with(writer, model, folder, model.kind())?,
        }
        self.write_tokenizer(folder)?;
        if let Some(base) = &self.adapter_base {
            let adapter = folder.join("adapter");
            std::fs::create_dir(&adapter).map_err(Error::write(&adapter))?;
            self.write_adapter(writer, &adapter, model, base)?;
        }
        Ok(())
    }

    fn write_adapter(&self, writer: &mut TensorWriter, folder: &Path, model: &Transformer, base: &str) -> Result<()> {
        checkpoint::save_adapter_with(writer, model, folder, base)?;
        self.write_tokenizer(folder)
    }

    fn write_tokenizer(&self, folder: &Path) -> Result<()> {
        tokenizer::copy_files(&self.tokenizer_folder, folder)?;
        if let Some(path) = &self.chat_template {
            tokenizer::write_chat_template(folder, &text_file::read(path)?)?;
        }
        self.eos_ids.as_ref().map_or(Ok(()), |ids| tokenizer::write_eos_ids(folder, ids))
    }

    /// Removes half-written files that a killed process left in the folder of a run.
    ///
    /// # Errors
    /// File-system errors.
    pub fn recover(run: &Path) -> Result<()> {
        [run, &checkpoints_folder(run)].into_iter().try_for_each(atomic_file::recover)
    }

    /// Prepares the end of a run whose final model is written: the link `best` if that model is the
    /// best, and the train state with which the same command finds the run complete.
    ///
    /// # Errors
    /// File-system errors.
    pub fn finish(&self, state: &TrainState) -> Result<()> {
        let best_step = state.validation.best.map(|best| best.step);
        if best_step == Some(state.step) {
            let checkpoint = checkpoint_name(state.step);
            let is_saved = self.folder().join(&checkpoint).exists();
            std::fs::create_dir_all(self.folder()).map_err(Error::write(self.folder()))?;
            let target = if is_saved { &checkpoint } else { FINAL_FROM_CHECKPOINTS };
            atomic_file::replace_link(&self.folder().join(BEST), target)?;
        }
        self.remove_old(best_step)?;
        write_state(&self.run, state)
    }

    /// The train state of a finished run; `None` for one that is not finished.
    ///
    /// # Errors
    /// A damaged or missing file.
    pub fn finished(&self) -> Result<Option<TrainState>> {
        if !self.run.join(SUMMARY_FILE).exists() {
            return Ok(None);
        }
        // Earlier versions have it in the last checkpoint alone.
        let folder = if has_state(&self.run) { self.run.clone() } else { self.folder().join(LATEST) };
        let advice = "the model in `final` is not affected; to train again, choose another output";
        let missing = || Error::file(&self.run, format!("is complete, but {STATE_FILE} is missing: {advice}"));
        read_state(&folder, advice)?.map(Some).ok_or_else(missing)
    }

    /// # Errors
    /// [`Error::File`] if the run was started with another fingerprint.
    pub fn check_fingerprint(&self, state: &TrainState, fingerprint: &RunFingerprint) -> Result<()> {
        let Some(difference) = state.fingerprint.difference("was started", fingerprint) else { return Ok(()) };
        let advice = "choose another output folder, or delete this one to start over";
        Err(Error::file(&self.run, format!("{difference}; {advice}")))
    }

    /// Checks the fingerprint of the newest checkpoint, if there is one, before anything is loaded.
    /// [`Self::resume`] reports a damaged one.
    ///
    /// # Errors
    /// As [`Self::check_fingerprint`].
    pub fn check_newest(&self, fingerprint: &RunFingerprint) -> Result<()> {
        let state = newest(&self.run)?.and_then(|folder| read_state(&folder, "").ok()?);
        state.map_or(Ok(()), |state| self.check_fingerprint(&state, fingerprint))
    }

    /// Restores the newest checkpoint, if there is one. Every process must call it; the main one
    /// compares the files with their checksums.
    ///
    /// # Errors
    /// A damaged checkpoint, or one of a run with another fingerprint.
    pub fn resume(
        &self,
        model: &Transformer,
        optimizer: &mut OptimizerState,
        fingerprint: &RunFingerprint,
        group: &ProcessGroup,
    ) -> Result<Option<TrainState>> {
        let Some(folder) = newest(&self.run)? else { return Ok(None) };
        let real_folder = folder.canonicalize().unwrap_or_else(|_| folder.clone());
        let advice = format!("delete {} to resume from the checkpoint before it", real_folder.display());
        let Some(state) = read_state(&folder, &advice)? else {
            let none = format!("none of its checkpoints has a {STATE_FILE} to resume from");
            let advice = "choose another output, or delete the folder to start over";
            return Err(Error::file(self.folder(), format!("{none}: {advice}")));
        };
        self.check_fingerprint(&state, fingerprint)?;
        if group.is_main() {
            checksum::check_folder(&folder, &advice)?;
        }
        optimizer_files::read(&folder, optimizer, model.config(), &advice)?;
        optimizer.finish_restore(state.num_skipped_steps)?;
        Ok(Some(state))
    }

    fn remove_old(&self, best_step: Option<usize>) -> Result<()> {
        let checkpoints = checkpoints(&self.run)?;
        let described: Vec<_> = checkpoints.iter().map(|(step, path)| (*step, has_state(path))).collect();
        let kept = kept_checkpoints(&described, best_step, self.max_checkpoints);
        checkpoints.iter().zip(kept).try_for_each(|((_, path), kept)| match kept {
            Kept::Whole => Ok(()),
            Kept::ModelOnly => remove_state(path),
            Kept::Nothing => atomic_file::remove_folder(path),
        })
    }
}

/// The checkpoint to resume a run from: the one that `latest` points to. If someone has deleted it or
/// its training state, the newest of the others, which loses less than starting over. A checkpoint
/// that cannot be resumed from is returned only if there is no other, so that it is reported.
fn newest(run: &Path) -> Result<Option<PathBuf>> {
    let latest = checkpoints_folder(run).join(LATEST);
    if has_state(&latest) {
        return Ok(Some(latest));
    }
    let mut others = checkpoints(run)?.into_iter().map(|(_, path)| path);
    Ok(others.rfind(|path| has_state(path)).or(Some(latest).filter(|latest| latest.exists())))
}

/// The name of the checkpoint after a step.
fn checkpoint_name(step: usize) -> String {
    format!("step-{step:06}")
}

/// Host memory that holds parts of a checkpoint of this size until they are written: all of it
/// where memory is plentiful, so that training can go on meanwhile, else a few pieces on each
/// process.
pub fn host_bytes_of_save(num_bytes: u64) -> u64 {
    waiting_bytes(num_bytes, available_bytes())
}

/// As [`host_bytes_of_save`], where so much memory is available.
fn waiting_bytes(num_bytes: u64, available_bytes: u64) -> u64 {
    if num_bytes <= available_bytes / MIN_HOST_MEMORY_PER_SAVE { num_bytes } else { STREAMING_BYTES as u64 }
}

fn available_bytes() -> u64 {
    HostMemory::detect().map_or(0, |memory| memory.available)
}

fn buffer_bytes(tensor: &Tensor) -> u64 {
    (tensor.numel() * tensor.kind().elt_size_in_bytes()) as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::validation::best_checkpoint::BestCheckpoint;

    struct Run(tempfile::TempDir);

    impl Run {
        /// A run with checkpoints to resume from and others that have a model only.
        fn new(steps: &[usize], models: &[usize]) -> Self {
            let run = Run(tempfile::tempdir().unwrap());
            for step in steps.iter().chain(models) {
                std::fs::create_dir_all(run.checkpoint(*step)).unwrap();
                std::fs::write(run.checkpoint(*step).join("model"), "").unwrap();
            }
            for step in steps {
                write_state(&run.checkpoint(*step), &state(*step, None)).unwrap();
                std::fs::write(run.checkpoint(*step).join("optimizer-00001-of-00001.safetensors"), "").unwrap();
            }
            run
        }

        fn checkpoint(&self, step: usize) -> PathBuf {
            checkpoints_folder(self.0.path()).join(format!("step-{step:06}"))
        }

        fn checkpoints(&self, max_checkpoints: usize) -> Checkpoints {
            let settings = Settings { output: self.0.path().to_owned(), max_checkpoints, ..Settings::plain() };
            Checkpoints::new(&settings, Path::new("")).unwrap()
        }

        /// The steps of the checkpoints to resume from, and of those with a model only.
        fn steps(&self) -> (Vec<usize>, Vec<usize>) {
            let all = checkpoints(self.0.path()).unwrap();
            let (resumable, models): (Vec<_>, Vec<_>) = all.into_iter().partition(|(_, path)| has_state(path));
            let models = models.into_iter().inspect(|(_, path)| {
                assert_eq!(std::fs::read_dir(path).unwrap().count(), 1, "{path:?}");
            });
            (resumable.into_iter().map(|(step, _)| step).collect(), models.map(|(step, _)| step).collect())
        }
    }

    fn state(step: usize, best_step: Option<usize>) -> TrainState {
        let mut state = TrainState { step, ..TrainState::initial(RunFingerprint::default()) };
        state.validation.best = best_step.map(|step| BestCheckpoint { step, tokens_per_forward_finished: 2.0 });
        state
    }

    #[test]
    fn a_run_resumes_from_checkpoints_with_training_state_only() {
        let run = Run::new(&[2, 4], &[6]);
        let newest = || newest(run.0.path()).unwrap();
        let latest = checkpoints_folder(run.0.path()).join(LATEST);
        assert_eq!(newest(), Some(run.checkpoint(4)));
        std::os::unix::fs::symlink("step-000004", &latest).unwrap();
        assert_eq!(newest(), Some(latest.clone()));
        remove_state(&run.checkpoint(4)).unwrap();
        assert_eq!(newest(), Some(run.checkpoint(2)));
        remove_state(&run.checkpoint(2)).unwrap();
        assert_eq!(newest(), Some(latest.clone()), "there is no other");
        std::fs::remove_file(&latest).unwrap();
        assert_eq!(newest(), None);
    }

    #[test]
    fn checkpoints_wait_in_memory_only_where_it_is_plentiful() {
        let gigabyte = 1_000_000_000;
        assert_eq!(waiting_bytes(10 * gigabyte, 40 * gigabyte), 10 * gigabyte);
        assert_eq!(waiting_bytes(10 * gigabyte, 39 * gigabyte), STREAMING_BYTES as u64);
        assert_eq!(waiting_bytes(10 * gigabyte, 0), STREAMING_BYTES as u64);
        // The buffers of the first checkpoint stay, so that the next one would find less memory.
        let run = Run::new(&[], &[]);
        let checkpoints = run.checkpoints(1);
        let _ = checkpoints.host_bytes_of_save(gigabyte);
        assert!(checkpoints.available_bytes.get().is_some(), "the first checkpoint decides");
    }

    #[test]
    fn the_final_model_can_be_the_best() {
        let run = Run::new(&[2, 4], &[3]);
        let target = || std::fs::read_link(checkpoints_folder(run.0.path()).join(BEST)).unwrap();
        for (last, best, expected) in [(5, 5, FINAL_FROM_CHECKPOINTS), (4, 4, "step-000004"), (6, 4, "step-000004")] {
            run.checkpoints(2).finish(&state(last, Some(best))).unwrap();
            assert_eq!(target(), Path::new(expected));
            assert_eq!(run.steps(), (vec![2, 4], vec![]));
        }
        assert_eq!(run.checkpoints(2).finished().unwrap(), None, "there is no summary");
        std::fs::write(run.0.path().join(SUMMARY_FILE), "").unwrap();
        assert_eq!(run.checkpoints(2).finished().unwrap().unwrap().step, 6);
        std::fs::remove_file(run.0.path().join(STATE_FILE)).unwrap();
        let message = run.checkpoints(2).finished().unwrap_err().to_string();
        assert!(message.contains("state.json is missing") && message.contains("choose another output"), "{message}");
    }
}
