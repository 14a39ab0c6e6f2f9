//! Decoder-only transformers of the Llama line from Hugging Face folders.

mod config;
mod hf_config;
mod kv_cache;
mod lora;
mod params;
mod presets;
mod rope;
mod transformer;

pub use config::{Family, ModelConfig, RopeScaling};
pub use kv_cache::KvCache;
pub(crate) use kv_cache::SlotMove;
pub(crate) use lora::{Adapter, Adapters};
pub use lora::{Lora, Target};
pub use params::Flat;
pub use presets::KnownShape;
pub use transformer::{ALIGNED, Branches, CachePlaces, Transformer};
pub(crate) use transformer::{Context, Layer, Linear, attend};
