//! CUDA kernels, graphs and collectives, and the few functions of libtorch that tch lacks: the safe
//! side of `csrc/`.
//!
//! `unsafe` is confined to this module and to the callers of `graph_runner::GraphRunner::launch`,
//! its only function that relies on its caller for memory safety. The other functions are sound
//! because:
//!
//! - `launch`: a kernel has a declared signature. Every launch checks the device, type,
//!   contiguity, alignment and size of its tensors. Forwards that are captured in graphs are
//!   checked once, at the capture.
//! - Indices inside tensors, which only the data could violate, come in types that check them where
//!   the host writes them: `forward_input::InputWriter` and `slot_moves::SlotMoves` for decoding,
//!   `attention::AttentionMask`, `train::Labels` and `train::TargetRows` for training.
//! - A graph keeps addresses, so `graph_runner::GraphRunner` owns the buffers and graphs of
//!   forwards and waits before it touches pinned memory that a copy may still use.
//!
//! Kernels do not depend on a particular model: a `shape::KernelShape` has the sizes that they are
//! compiled for.
#![allow(unsafe_code)]

pub(crate) mod attention;
mod batch_products;
pub(crate) mod block_mask;
pub(crate) mod collectives;
pub(crate) mod decode;
pub(crate) mod draft_adapters;
pub(crate) mod forward_input;
pub(crate) mod graph_runner;
pub(crate) mod graphs;
pub(crate) mod host_buffer;
mod launch;
pub(crate) mod layer_products;
pub mod libtorch;
pub(crate) mod nvrtc;
pub mod optimizer;
pub(crate) mod shape;
pub(crate) mod slot_moves;
pub(crate) mod store;
pub(crate) mod tiles;
pub mod train;

use libtorch::{checked, pointer};
