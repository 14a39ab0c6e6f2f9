//! Decoder-only transformers of the Llama line from Hugging Face folders.

mod config;
mod hf_config;
mod init;
mod kernel_shape;
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
pub use lora::{LoraConfig, LoraTarget};
pub use params::ParamBuffer;
pub use presets::ModelPreset;
pub use transformer::{ALIGNED, SlotMapping, Transformer, TreeMask};
pub(crate) use transformer::{Context, Layer, Linear, attend};
