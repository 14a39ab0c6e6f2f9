//! Decoder-only transformers of the Llama line from Hugging Face folders.

mod config;
mod fused;
mod kv_cache;
mod lora;
mod peft;
mod raw_config;
mod rope;
mod transformer;
mod weights;

pub use config::{Family, ModelConfig, RopeScaling};
pub(crate) use fused::{Fused, StepInput, StepSize};
pub use kv_cache::KvCache;
pub use lora::{Lora, Target};
pub use peft::{base_folder, is_adapter};
pub use transformer::{ALIGNED, Transformer};
pub(crate) use weights::write_safetensors;
pub use weights::{check, fingerprint};
