//! The library behind `cllm-data`, `cllm-train` and `cllm-eval`: models, decoding, trajectories and
//! tasks. The programs share it so that a prompt, a forward pass and a score are each defined once.

pub mod atomic_file;
pub mod bench_results;
pub mod capacity;
pub mod chat_template;
pub mod checkpoint;
pub mod checksum;
mod codec;
pub mod cuda;
pub mod decode;
mod deep_stack;
pub mod device;
pub mod disk;
pub mod distributed;
pub mod environment;
mod error;
pub mod fingerprint;
pub mod gpus;
pub mod interrupt;
pub mod model;
pub mod output_folder;
mod parquet_file;
pub mod pieces;
pub mod printable;
pub mod process_memory;
pub mod program;
pub mod progress;
pub mod prompt_set;
pub mod sandbox;
pub mod settings;
pub mod statistics;
pub mod task;
pub mod text_file;
pub mod thought;
pub mod thought_text;
pub mod tokenizer;
mod tokenizer_parts;
pub mod train;
mod training_turn;
pub mod trajectory;

pub use error::{Error, Result, io_reason};
pub use training_turn::TrainingTurn;

/// Version of this toolkit, recorded in every file it writes.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
