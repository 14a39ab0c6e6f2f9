//! The safe face of `csrc/` and of what libtorch has but tch lacks: the only room with `unsafe`.
#![allow(unsafe_code)]

pub mod attention;
pub mod block_mask;
pub mod collectives;
pub mod decode;
pub mod graphs;
pub mod libtorch;
pub mod nvrtc;
pub mod shape;
pub mod train;

use libtorch::{checked, pointer};
