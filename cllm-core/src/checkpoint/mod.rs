//! Model folders in Hugging Face's form: where they are found, read and written.

pub mod hub;
pub(crate) mod peft;
pub(crate) mod safetensors;

pub use peft::{base_folder, is_adapter};
pub use safetensors::{check, fingerprint, write_safetensors};
