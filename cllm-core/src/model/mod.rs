//! Decoder-only transformers of the Llama line from Hugging Face folders.

mod config;
mod flat;
mod fused;
mod fused_training;
mod known;
mod kv_cache;
mod lora;
mod packed;
mod peft;
mod raw_config;
mod rope;
mod tiles;
mod transformer;
mod weights;

pub use config::{Family, ModelConfig, RopeScaling};
pub use flat::Flat;
pub(crate) use fused::{Fused, StepInput, StepSize};
pub use known::KnownShape;
pub use kv_cache::KvCache;
pub(crate) use kv_cache::SlotMove;
pub use lora::{Lora, Target};
pub use packed::{DeviceStream, Pass, Seen, Stream};
pub use peft::{base_folder, is_adapter};
pub(crate) use tiles::{Meetings, meetings};
pub use transformer::{ALIGNED, Branches, CachePlaces, Transformer};
pub(crate) use weights::write_safetensors;
pub use weights::{check, fingerprint};
