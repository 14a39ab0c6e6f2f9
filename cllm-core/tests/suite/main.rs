//! Tests across modules, in one binary.

mod decoding;
mod models;
mod trajectories;
