//! Loads what a run starts from: the tokenizer, the student, and the frozen model that anchors it.

use std::path::{Path, PathBuf};

use cllm_core::chat_template::today;
use cllm_core::checkpoint::{self, hub, is_adapter};
use cllm_core::model::{BaseDtype, ModelConfig, Transformer};
use cllm_core::tokenizer::Tokenizer;
use cllm_core::{Error, Result, device, progress, train};
use serde_json::json;
use tch::Device;

use crate::settings::{InitSettings, Settings};

/// The models of a run.
pub struct Models {
    pub student: Transformer,
    /// The frozen model of the anchor loss; `None` without that loss.
    pub anchor: Option<Transformer>,
}

impl Models {
    /// Says so if training takes the slow way on this device.
    ///
    /// # Errors
    /// [`Error::Torch`] if the device does not answer.
    pub fn log_slow_path(&self) -> Result<()> {
        let student = &self.student;
        if let Some(reason) = train::slow_path_reason_on(student.config(), student.kind(), student.device())? {
            progress::log(slow_path_warning(&reason));
        }
        Ok(())
    }

    /// Loads the models of a run whose student and tokenizer are in `folder`, or makes random
    /// weights.
    ///
    /// # Errors
    /// Bad model folders, shapes and vocabularies.
    pub fn load(settings: &Settings, tokenizer: &Tokenizer, folder: &Path, device: Device) -> Result<Self> {
        let kind = device::default_kind(device);
        let mut student = match (&settings.init, &settings.lora) {
            (Some(init), _) => Transformer::random(init_config(init, tokenizer)?, settings.seed, device, kind),
            (None, Some(lora)) => checkpoint::load_base(folder, device, kind, lora.base_dtype)?,
            (None, None) => checkpoint::load(folder, device, kind)?,
        };
        if let Some(lora) = &settings.lora {
            student.add_adapters(lora, settings.seed);
        }
        let anchor = match (settings.is_anchored(), &settings.consistency.anchor, &settings.lora) {
            (false, ..) => None,
            (true, Some(name), _) => Some(load_anchor(name, student.config(), device)?),
            // The weights below the adapters are still those that the run starts from.
            (true, None, Some(_)) => Some(student.without_adapters()),
            (true, None, None) => Some(checkpoint::load(folder, device, kind)?),
        };
        Ok(Models { student, anchor })
    }

    /// Random weights drawn on the device, to measure speed with. An anchor has the shape of the
    /// student.
    ///
    /// # Errors
    /// Adapters that do not fit; [`cllm_core::Error::Torch`] when memory runs out.
    pub fn random(config: ModelConfig, settings: &Settings, device: Device) -> Result<Self> {
        settings.lora.iter().try_for_each(|lora| lora.check(&config))?;
        let random = || Transformer::random_on_device(config.clone(), device, device::default_kind(device));
        let mut student = random();
        if let Some(lora) = &settings.lora {
            if lora.base_dtype == BaseDtype::Int8 {
                student = student.to_quantized()?;
            }
            student.add_adapters(lora, settings.seed);
        }
        let anchor = match (settings.is_anchored(), &settings.consistency.anchor, &settings.lora) {
            (false, ..) => None,
            (true, None, Some(_)) => Some(student.without_adapters()),
            (true, ..) => Some(random()),
        };
        Ok(Models { student, anchor })
    }
}

/// Tells a user that training takes the slow way, if [`train::slow_path_reason`] gives a reason.
pub fn slow_path_warning(reason: &str) -> String {
    format!("slow: {reason}; libtorch's operations take several times as long and need more memory")
}

fn load_anchor(name: &str, student: &ModelConfig, device: Device) -> Result<Transformer> {
    let folder = hub::locate(name)?;
    let vocab_size = checkpoint::load_config(&folder)?.vocab_size;
    if vocab_size != student.vocab_size {
        let message = format!(
            "consistency.anchor has a vocabulary of {vocab_size} tokens, but the model of the run has {}: they must be \
             the same",
            student.vocab_size
        );
        return Err(Error::file(folder, message));
    }
    checkpoint::load(&folder, device, device::default_kind(device))
}

/// The tokenizer of a run, and the folder that it is in. Unless the weights are random, the model
/// is there too.
///
/// # Errors
/// Missing folders and files; end-of-answer ids that are not in the vocabulary.
pub fn load_tokenizer(settings: &Settings) -> Result<(Tokenizer, PathBuf)> {
    let folder = match (&settings.init, &settings.model) {
        (Some(init), _) => init.tokenizer.clone(),
        (None, Some(model)) => locate_model(model, settings)?,
        (None, None) => return Err(Error::usage("model is not set: add `model=...`")),
    };
    let rendering = settings.rendering.resolve(today())?;
    let tokenizer = Tokenizer::load_for(&folder, &rendering)?;
    let vocab_size = match settings.init {
        Some(_) => tokenizer.vocab_size() as i64,
        None => checkpoint::load_config(&folder)?.vocab_size,
    };
    let tokenizer = tokenizer.with_eos_ids(settings.eos_ids.as_deref(), &folder, vocab_size)?;
    Ok((tokenizer, folder))
}

fn locate_model(model: &str, settings: &Settings) -> Result<PathBuf> {
    let folder = hub::locate(model)?;
    checkpoint::refuse_draft_adapters(&folder, "are not trained further")?;
    if settings.lora.is_some() && is_adapter(&folder) {
        let message =
            "is an adapter, and adapters cannot be stacked: merge it into its model with `cllm-train export` first";
        return Err(Error::file(folder, message));
    }
    Ok(folder)
}

/// The configuration of the student of a run whose model and tokenizer are in `folder`.
///
/// # Errors
/// Bad model folders and shapes.
pub fn load_config(settings: &Settings, tokenizer: &Tokenizer, folder: &Path) -> Result<ModelConfig> {
    let config = match &settings.init {
        None => checkpoint::load_config(folder)?,
        Some(init) => init_config(init, tokenizer)?,
    };
    settings.lora.iter().try_for_each(|lora| lora.check(&config))?;
    Ok(config)
}

/// The configuration of a Llama with random weights.
///
/// # Errors
/// [`Error::Usage`] for sizes that do not fit together.
fn init_config(init: &InitSettings, tokenizer: &Tokenizer) -> Result<ModelConfig> {
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
