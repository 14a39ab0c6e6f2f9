//! Decoder-only transformers of the Llama line: their configuration, weights and forward pass.

mod attention;
mod config;
mod hf_config;
mod init;
mod kernel_shape;
mod kv_cache;
mod linear;
mod lora;
mod params;
mod quantized;
mod rope;
mod shapes;
mod sliding_window;
mod transformer;

pub(crate) use attention::{Attention, attention_bias, repeat_heads, scaled_dot_product_attention};
pub use attention::{SlotMapping, TreeMask};
pub use config::{Family, ModelConfig};
pub use kv_cache::KvCache;
pub(crate) use kv_cache::{SlotCopy, SlotMove};
pub(crate) use linear::Linear;
pub use lora::{AdaptedTokens, LoraConfig, LoraTarget};
pub(crate) use lora::{JoinedAdapters, LoraAdapter, LoraAdapters};
pub use params::ParamBuffer;
pub use quantized::BaseDtype;
pub(crate) use quantized::ModelParams;
pub use rope::RopeScaling;
pub(crate) use rope::Rotation;
pub use shapes::ModelShape;
pub(crate) use sliding_window::PerWindow;
pub(crate) use transformer::Layer;
pub use transformer::Transformer;
