//! Jacobi trajectories: the data set that `collect` writes, and that training and the profiles
//! read.
//!
//! A data set is a folder of Parquet shards and a manifest that lists them. A row is one response
//! with every state of each of its blocks, so that a prefix is stored once. Shards appear whole or
//! not at all, which lets a stopped run resume; rows are checked as they are read, so that users of
//! a [`Reader`] can rely on their shape.

mod manifest;
mod profile;
mod reader;
mod row;
mod schema;
mod writer;

pub use manifest::{
    INCOMPLETE_DATA_SET, Manifest, Provenance, ShardEntry, check_world_size, fingerprint, holds_rows, rank_folder,
    stored_date,
};
pub use profile::{BlockProfile, Profile};
pub use reader::{Reader, RowChunk, Rows};
pub use row::{Block, FinishReason, Trajectory};
pub use schema::SCHEMA_VERSION;
pub use writer::Writer;
