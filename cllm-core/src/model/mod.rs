//! Decoder-only transformers of the Llama line from Hugging Face folders.

mod config;
mod fused;
mod kv_cache;
mod raw_config;
mod rope;
mod transformer;
mod weights;

pub use config::{Family, ModelConfig, RopeScaling};
pub(crate) use fused::{Fused, StepInput, StepSize};
pub use kv_cache::KvCache;
pub(crate) use kv_cache::SlotMove;
pub use transformer::{ALIGNED, Branches, CachePlaces, Transformer};
pub(crate) use weights::write_safetensors;
pub use weights::{check, fingerprint};
