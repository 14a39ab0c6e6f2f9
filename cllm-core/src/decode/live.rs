//! A batch that requests join and leave while it runs, as a server needs it.

use super::backend::Backend;
use super::engine::CacheLimits;
use super::prefix_cache::PrefixCache;
use super::request::{Answer, DecodeOptions, Job, OnTokens, Request, StopConditions, Timing};
use super::sampling::Sampling;
use super::scheduler::{Events, PrefillPolicy, Scheduler};
use super::strategy::Strategy;
use super::window_chooser::WindowChooser;
use crate::Result;

/// How the rows of a live batch's KV cache are used.
#[derive(Debug, Clone, Copy)]
pub struct LiveRows {
    /// Maximum number of sequences that run at once.
    pub max_running: usize,
    /// Rows that keep the beginnings of prompts.
    pub num_prefix_rows: usize,
}

impl LiveRows {
    /// Rows that a decoder needs: one more, through which rows are exchanged.
    pub fn num_rows(self) -> usize {
        self.max_running + 1 + self.num_prefix_rows
    }
}

/// A request with how its tokens are sampled.
#[derive(Debug, Clone)]
pub struct LiveRequest {
    pub request: Request,
    pub stop: StopConditions,
    pub sampling: Sampling,
    /// Seeds the initial drafts and sampling above temperature 0.
    pub seed: u64,
}

/// A running batch. Prompts are cached in chunks, in the forwards that decode other sequences, and
/// share a forward fairly: a long one does not hold up short ones.
pub struct LiveBatch<'d> {
    backend: Box<dyn Backend + 'd>,
    scheduler: Scheduler<'d>,
    limits: &'d CacheLimits,
    strategy: Strategy,
}

impl<'d> LiveBatch<'d> {
    pub(super) fn new(
        backend: Box<dyn Backend + 'd>,
        chooser: &'d mut WindowChooser,
        limits: &'d CacheLimits,
        strategy: Strategy,
        rows: LiveRows,
    ) -> Self {
        let nothing = std::iter::empty();
        let scheduler = Scheduler::new(nothing, rows.max_running, strategy, PrefillPolicy::Shared, chooser);
        let prefixes = PrefixCache::new(rows.max_running + 1, rows.num_prefix_rows, limits.capacity);
        LiveBatch { backend, scheduler: scheduler.with_prefixes(prefixes), limits, strategy }
    }

    /// Whether another request may join.
    pub fn has_room(&self) -> bool {
        self.scheduler.has_room()
    }

    pub fn num_running(&self) -> usize {
        self.scheduler.num_running()
    }

    /// Adds a request. Requests are numbered from 0 in the order in which they join. Returns how many
    /// tokens of the prompt were cached already.
    ///
    /// # Errors
    /// [`crate::Error::Usage`] if the request does not fit the context or the cache; libtorch's.
    pub fn join(&mut self, live: LiveRequest) -> Result<usize> {
        let LiveRequest { request, stop, sampling, seed } = live;
        self.limits.check(&request, &stop, self.strategy)?;
        let options = DecodeOptions { strategy: self.strategy, seed, record_trajectory: false, sampling };
        let _no_grad = tch::no_grad_guard();
        self.scheduler.join(Job { request, stop, options }, self.backend.as_mut())
    }

    /// Removes the sequence of a request, if it runs.
    ///
    /// # Errors
    /// libtorch's.
    pub fn leave(&mut self, index: usize) -> Result<()> {
        let _no_grad = tch::no_grad_guard();
        self.scheduler.leave(index, self.backend.as_mut())
    }

    /// Runs one forward, and reports the tokens that it added to each answer and the answers that
    /// ended. Returns false, without a forward, if nothing runs.
    ///
    /// # Errors
    /// libtorch's, and those of `on_finished`.
    pub fn step(
        &mut self,
        on_tokens: OnTokens<'_>,
        on_finished: &mut dyn FnMut(usize, Answer) -> Result<()>,
    ) -> Result<bool> {
        let _no_grad = tch::no_grad_guard();
        self.scheduler.step(self.backend.as_mut(), &mut Events { on_tokens, on_finished })
    }

    /// Time in forwards so far.
    pub fn timing(&self) -> Timing {
        self.scheduler.timing()
    }

    /// The part of the prefix cache that is in use.
    pub fn prefix_use_ratio(&self) -> f64 {
        self.scheduler.prefixes().map_or(0.0, PrefixCache::use_ratio)
    }
}
