//! Trains teachers (supervised) and students (consistency). `trainer` is the loop of a run; from
//! there, `data` makes batches, `step` trains on them, `validation` measures the model, and
//! `checkpoint` saves it.

mod bench;
mod byte_size;
mod checkpoint;
pub mod cli;
mod custom_generate;
pub mod data;
mod export;
pub mod gguf;
pub mod loss;
pub mod losses;
mod memory;
mod metrics;
mod model_card;
mod models;
pub mod optimizer;
mod optimizer_files;
mod plan;
mod processes;
mod prune;
mod random_model;
pub mod rounds;
mod run_fingerprint;
mod run_folder;
pub mod settings;
mod step;
mod summary;
mod template;
pub mod tensorboard;
pub mod tokenizer_training;
mod train_state;
pub mod trainer;
mod validation;
mod word_split;
