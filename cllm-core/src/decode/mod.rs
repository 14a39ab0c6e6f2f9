//! Decoding: every strategy behind one engine.
//!
//! One forward adds at least one token to every sequence that decodes. The scheduler admits
//! requests into the rows of the KV cache and feeds their prompts to the backend in chunks. A
//! sequence whose prompt is cached contributes a window: its last token, followed by the draft
//! tokens of its proposer, in order or as a tree. The backend forwards all windows as one batch and
//! samples a token after each position. Acceptance keeps the longest path of draft tokens that the
//! model itself would have chosen, and the token sampled at its end; from the rest the proposer
//! makes its next draft.
//!
//! A draft therefore decides how many tokens a forward yields and never which tokens: every
//! strategy gives the answer of autoregressive decoding, which is the Jacobi proposer with blocks
//! of one token. In bfloat16 this holds up to rounding: forwards of different widths round
//! differently, which can decide between two almost equal logits.
//!
//! `Scheduler::step` in `scheduler.rs` is one forward from top to bottom.

mod acceptance;
mod backend;
mod engine;
mod live;
mod prefix_cache;
mod proposer;
mod request;
mod sampling;
mod scheduler;
mod sequence;
mod strategy;
mod tree;
mod width;
mod window_chooser;

pub use crate::cuda::decode::MAX_LOGITS;
pub use backend::attention_time::attention_seconds;
pub use backend::cuda_graph::MAX_PROMPT_TOKENS;
pub use backend::cuda_model::has_kernels;
pub use backend::eager::MAX_PIECE_TOKENS;
pub use engine::{Decoder, RunningAnswer, decode};
pub use live::{LiveBatch, LiveRequest, LiveRows};
pub use request::{
    Answer, DecodeOptions, OnTokens, Request, StopConditions, Timing, check_fits_context, required_slots,
};
pub use sampling::Sampling;
pub use strategy::{MAX_GATED_TOKENS, NO_DRAFT_ADAPTERS, Strategy};
pub use width::Width;

#[cfg(test)]
mod live_tests;
#[cfg(test)]
mod tests;
