//! Checkpoints of a run: a Hugging Face folder (or an adapter alone) with the training state beside
//! it. A checkpoint appears whole or not at all, so that a run that was killed at any moment
//! resumes from the one before.
//!
//! `checkpoints/step-NNNNNN` are the folders; the links `latest` and `best` point to two of them.

use std::path::{Path, PathBuf};

use cllm_core::atomic_file::{self, UnfinishedFolder};
use cllm_core::chat_template::Date;
use cllm_core::checkpoint::{self, STREAMING_BYTES, TensorWriter};
use cllm_core::distributed::ProcessGroup;
use cllm_core::model::Transformer;
use cllm_core::{Error, Result, text_file, tokenizer};

use crate::optimizer::OptimizerState;
use crate::optimizer_files;
use crate::run_fingerprint::RunFingerprint;
use crate::settings::Settings;
use crate::train_state::TrainState;

/// The file of a checkpoint that has its train state.
const STATE_FILE: &str = "state.json";

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
    max_checkpoints: usize,
}

impl Checkpoints {
    pub fn new(settings: &Settings, tokenizer_folder: &Path) -> Self {
        Checkpoints {
            run: settings.output.clone(),
            tokenizer_folder: tokenizer_folder.to_owned(),
            adapter_base: settings.lora.as_ref().and_then(|_| settings.model.clone()),
            eos_ids: settings.eos_ids.clone(),
            chat_template: settings.rendering.chat_template.clone(),
            max_checkpoints: settings.max_checkpoints,
        }
    }

    /// The date on which a run was started; `None` if its folder has no readable checkpoint, which
    /// [`Checkpoints::resume`] reports.
    pub fn started_on(run: &Path) -> Option<Date> {
        let path = run.join("checkpoints/latest/state.json");
        let state: TrainState = serde_json::from_str(&text_file::read(&path).ok()?).ok()?;
        state.fingerprint.date()
    }

    fn folder(&self) -> PathBuf {
        self.run.join("checkpoints")
    }

    /// Whether there is a checkpoint to resume from.
    pub fn has_latest(&self) -> bool {
        self.folder().join("latest").exists()
    }

    /// Writes a checkpoint, moves `latest` (and `best`) to it and removes old ones. Every process
    /// must call it: each writes its optimizer state, the main one the rest.
    ///
    /// # Errors
    /// File-system errors, a process that has died.
    pub fn save(
        &self,
        model: &Transformer,
        optimizer: &OptimizerState,
        state: &TrainState,
        group: &ProcessGroup,
    ) -> Result<()> {
        let name = format!("step-{:06}", state.step);
        let path = self.folder().join(&name);
        let unfinished = if group.is_main() { Some(UnfinishedFolder::create(&path)?) } else { None };
        let work = group.broadcast(unfinished.as_ref().map(|folder| folder.work().to_owned()), model.device())?;
        let work = work.ok_or_else(|| Error::internal("the main process began no checkpoint"))?;
        self.write_checkpoint(&work, model, optimizer, state, group)
            .map_err(|error| atomic_file::with_final_path(error, &work, &path))?;
        // Only when every process has written its part, the folder is whole.
        group.barrier(model.device())?;
        let Some(unfinished) = unfinished else { return Ok(()) };
        unfinished.finish()?;
        let best_step = state.validation.best.map(|best| best.step);
        // `best` is moved first: a kill in between must not leave `latest` with a best checkpoint
        // that no link points to.
        if best_step == Some(state.step) {
            replace_link(&self.folder(), "best", &name)?;
        }
        replace_link(&self.folder(), "latest", &name)?;
        self.remove_old(best_step)
    }

    fn write_checkpoint(
        &self,
        folder: &Path,
        model: &Transformer,
        optimizer: &OptimizerState,
        state: &TrainState,
        group: &ProcessGroup,
    ) -> Result<()> {
        let mut writer = TensorWriter::new(model.device(), STREAMING_BYTES);
        // An adapter is no model, and small.
        let skip_masters = optimizer.masters_are_saved_weights() && self.adapter_base.is_none();
        optimizer_files::write(&mut writer, folder, optimizer, group, skip_masters)?;
        optimizer.with_average(|| match &self.adapter_base {
            _ if !group.is_main() => Ok(()),
            Some(base) => self.write_adapter(&mut writer, folder, model, base),
            None => self.write_model(&mut writer, folder, model),
        })?;
        if group.is_main() {
            atomic_file::write_json(&folder.join(STATE_FILE), state)?;
        }
        writer.finish()
    }

    /// Writes the final model. Every process must call it; the main one writes.
    ///
    /// # Errors
    /// File-system errors, a process that has died.
    pub fn save_final(&self, model: &Transformer, optimizer: &OptimizerState, group: &ProcessGroup) -> Result<PathBuf> {
        let target = self.run.join("final");
        optimizer.with_average(|| {
            if !group.is_main() {
                return Ok(());
            }
            atomic_file::write_folder_with(&target, |folder| {
                let mut writer = TensorWriter::new(model.device(), STREAMING_BYTES);
                self.write_model(&mut writer, folder, model)?;
                writer.finish()
            })
        })?;
        Ok(target)
    }

    /// Writes a model with its tokenizer. Adapters are merged, and saved once more by themselves in
    /// `adapter`.
    fn write_model(&self, writer: &mut TensorWriter, folder: &Path, model: &Transformer) -> Result<()> {
        checkpoint::save_with(writer, model, folder, model.kind())?;
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

    /// Removes half-written files that a killed process left.
    ///
    /// # Errors
    /// File-system errors.
    pub fn recover(&self) -> Result<()> {
        [&self.run, &self.folder()].into_iter().try_for_each(|folder| atomic_file::recover(folder))
    }

    /// Restores the newest checkpoint, if there is one. Every process must call it.
    ///
    /// # Errors
    /// A damaged checkpoint, or one of a run with another fingerprint.
    pub fn resume(
        &self,
        model: &Transformer,
        optimizer: &mut OptimizerState,
        fingerprint: &RunFingerprint,
    ) -> Result<Option<TrainState>> {
        let Some(folder) = self.newest()? else { return Ok(None) };
        let real_folder = folder.canonicalize().unwrap_or_else(|_| folder.clone());
        let advice = format!("delete {} to resume from the checkpoint before it", real_folder.display());
        let path = folder.join(STATE_FILE);
        let state: TrainState = serde_json::from_str(&text_file::read(&path)?)
            .map_err(|error| Error::file(&path, format!("is damaged ({error}): {advice}")))?;
        if let Some(difference) = state.fingerprint.difference("was started", fingerprint) {
            let advice = "choose another output folder, or delete this one to start over";
            return Err(Error::file(&self.run, format!("{difference}; {advice}")));
        }
        optimizer_files::read(&folder, optimizer, model.config(), &advice)?;
        optimizer.finish_restore(state.num_skipped_steps)?;
        Ok(Some(state))
    }

    /// The checkpoint that `latest` points to. If someone has deleted it, the newest of the others,
    /// which loses less than starting over.
    fn newest(&self) -> Result<Option<PathBuf>> {
        let latest = self.folder().join("latest");
        if latest.exists() {
            return Ok(Some(latest));
        }
        Ok(self.steps()?.pop().map(|(_, newest)| newest))
    }

    /// What the folder of the run has of earlier saves.
    ///
    /// # Errors
    /// Folders that cannot be read.
    pub fn stored_bytes(&self) -> Result<StoredBytes> {
        let checkpoints = self.steps()?.into_iter().map(|(step, path)| Ok((step, folder_bytes(&path)?)));
        Ok(StoredBytes {
            checkpoints: checkpoints.collect::<Result<_>>()?,
            final_model: folder_bytes(&self.run.join("final"))?,
            unfinished: [&self.run, &self.folder()]
                .into_iter()
                .map(|folder| unfinished_bytes(folder))
                .sum::<Result<_>>()?,
        })
    }

    fn remove_old(&self, best_step: Option<usize>) -> Result<()> {
        let mut steps = self.steps()?;
        steps.retain(|(step, _)| Some(*step) != best_step);
        let num_old = steps.len().saturating_sub(self.max_checkpoints);
        steps[..num_old].iter().try_for_each(|(_, path)| std::fs::remove_dir_all(path).map_err(Error::write(path)))
    }

    /// All checkpoints with their steps, oldest first.
    fn steps(&self) -> Result<Vec<(usize, PathBuf)>> {
        let folder = self.folder();
        let mut steps = Vec::new();
        if !folder.exists() {
            return Ok(steps);
        }
        for entry in std::fs::read_dir(&folder).map_err(Error::io(&folder))? {
            let path = entry.map_err(Error::io(&folder))?.path();
            let step = path.file_name().and_then(|name| name.to_str()?.strip_prefix("step-")?.parse().ok());
            steps.extend(step.map(|step| (step, path)));
        }
        steps.sort();
        Ok(steps)
    }
}

/// Bytes of the checkpoints and of the final model in the folder of a run.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StoredBytes {
    /// With their steps, oldest first.
    pub checkpoints: Vec<(usize, u64)>,
    pub final_model: u64,
    /// What a killed process left, which the next one removes.
    pub unfinished: u64,
}

fn unfinished_bytes(folder: &Path) -> Result<u64> {
    atomic_file::unfinished(folder)?.iter().map(|path| folder_bytes(path)).sum()
}

/// Bytes of a file, or of all files in a folder and in those below it; 0 if there is none.
fn folder_bytes(folder: &Path) -> Result<u64> {
    if !folder.is_dir() {
        return Ok(folder.metadata().map_or(0, |metadata| metadata.len()));
    }
    let entries = std::fs::read_dir(folder).map_err(Error::io(folder))?;
    entries.map(|entry| folder_bytes(&entry.map_err(Error::io(folder))?.path())).sum()
}

/// Makes the link `name` point to `target`, in one atomic step.
fn replace_link(folder: &Path, name: &str, target: &str) -> Result<()> {
    let new = folder.join(format!(".{name}"));
    let _ = std::fs::remove_file(&new);
    std::os::unix::fs::symlink(target, &new).map_err(Error::write(&new))?;
    std::fs::rename(&new, folder.join(name)).map_err(Error::write(folder))
}
