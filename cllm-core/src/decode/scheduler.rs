//! The scheduler decides what runs in each forward. [`Scheduler::step`] is one forward from top to
//! bottom.

use std::time::Instant;

use super::backend::{Backend, Outputs, PromptChunk, Window};
use super::request::{Answer, DecodeOptions, OnTokens, Request, StopConditions, Timing};
use super::sequence::Sequence;
use super::window_chooser::WindowChooser;
use crate::model::SlotMove;
use crate::{Result, interrupt};

/// When prompts are cached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum PrefillPolicy {
    /// In forwards of their own, while the other sequences wait.
    First,
    /// In chunks, in the same forwards that decode other sequences.
    Chunked,
}

/// Callbacks to the caller. They identify a sequence by the index of its request.
pub(super) struct Events<'e> {
    pub(super) on_tokens: OnTokens<'e>,
    /// Called with each answer as it finishes.
    pub(super) on_finished: &'e mut dyn FnMut(usize, Answer) -> Result<()>,
}

/// Decides which sequences run in each forward.
///
/// The sequence at an index of `running` owns the row of the KV cache with the same index.
/// Sequences that decode come before those whose prompt is still being cached, so a batch of
/// windows is always a batch of leading rows.
pub(super) struct Scheduler<'r> {
    waiting: Box<dyn Iterator<Item = Result<Request>> + 'r>,
    num_admitted: usize,
    running: Vec<Sequence<'r>>,
    max_running: usize,
    stop: &'r StopConditions,
    options: DecodeOptions,
    prefill: PrefillPolicy,
    chooser: &'r mut WindowChooser,
    timing: Timing,
}

impl<'r> Scheduler<'r> {
    /// Runs at most `max_running` of the waiting requests at once.
    pub(super) fn new(
        waiting: impl Iterator<Item = Result<Request>> + 'r,
        max_running: usize,
        stop: &'r StopConditions,
        options: DecodeOptions,
        prefill: PrefillPolicy,
        chooser: &'r mut WindowChooser,
    ) -> Self {
        let (waiting, running, timing) = (Box::new(waiting), Vec::new(), Timing::default());
        Scheduler { waiting, num_admitted: 0, running, max_running, stop, options, prefill, chooser, timing }
    }

    /// Runs forwards until every request is answered.
    pub(super) fn run(mut self, backend: &mut dyn Backend, events: &mut Events<'_>) -> Result<Timing> {
        while self.step(backend, events)? {}
        Ok(self.timing)
    }

    /// Runs one forward. Returns false, without a forward, once every request is answered.
    pub(super) fn step(&mut self, backend: &mut dyn Backend, events: &mut Events<'_>) -> Result<bool> {
        // 1. Admit waiting requests into free rows of the cache.
        self.admit()?;
        if self.running.is_empty() {
            return Ok(false);
        }
        interrupt::check()?;
        let started = Instant::now();

        // 2. Choose how many tokens each window drafts, if the strategy leaves that open.
        self.choose_widths();

        // 3. Cut the prompts that are not cached yet into chunks for this forward.
        let chunks = self.prompt_chunks(backend.max_prompt_tokens());
        let cached: Vec<(usize, usize)> = chunks.iter().map(|chunk| (chunk.row, chunk.tokens.len())).collect();

        // 4. Build the windows: the last token and the draft of each sequence whose prompt is cached.
        //    With `PrefillPolicy::First`, they wait until all prompts are cached.
        let windows = if self.prefill == PrefillPolicy::First && !chunks.is_empty() { vec![] } else { self.windows() };
        let strategy = self.options.strategy;
        let num_window_tokens: usize = windows.iter().map(|window| strategy.num_forwarded(window.len())).sum();
        let has_prompts = !chunks.is_empty();

        // 5. Forward. The backend samples a token after each token of each window.
        // Without drafts, there is nothing that candidates could be drafted after.
        let has_drafts = windows.iter().any(|window| !window.draft.is_empty());
        let candidates = has_drafts && strategy.needs_candidates();
        let outputs = Outputs { sampling: self.options.sampling, candidates };
        backend.launch(&chunks, &windows, outputs)?;
        let predictions = backend.collect(&windows)?;
        for (row, num_tokens) in cached {
            self.running[row].add_cached(num_tokens);
        }

        // 6. Accept the draft tokens that the model would have chosen itself. Each proposer makes
        //    its next draft.
        let mut moves = Vec::new();
        for (row, (sequence, predictions)) in self.running.iter_mut().zip(&predictions).enumerate() {
            let accepted = sequence.accept(predictions);
            moves.extend(accepted.moves.into_iter().map(|(from, to)| SlotMove { row, from, to }));
            (events.on_tokens)(accepted.request_index, accepted.tokens);
        }

        // 7. Move the keys and values of accepted tokens to the slots of their positions. Only
        //    trees need this.
        if !moves.is_empty() {
            backend.move_slots(&moves)?;
        }
        let seconds = started.elapsed().as_secs_f64();
        let timing = match predictions.is_empty() {
            true => Timing { prefill_seconds: seconds, decode_seconds: 0.0 },
            false => Timing { prefill_seconds: 0.0, decode_seconds: seconds },
        };
        self.timing += timing;
        self.running.iter_mut().for_each(|sequence| sequence.add_time(timing));
        if !predictions.is_empty() {
            self.learn(num_window_tokens, (!has_prompts).then_some(seconds));
        }

        // 8. Evict the sequences that have finished. Others move up into their rows.
        self.evict_finished(backend, events)?;
        Ok(true)
    }

    /// Time spent so far.
    pub(super) fn timing(&self) -> Timing {
        self.timing
    }

    fn admit(&mut self) -> Result<()> {
        while self.running.len() < self.max_running {
            let Some(request) = self.waiting.next() else { break };
            self.running.push(Sequence::new(self.num_admitted, request?, self.stop, self.options));
            self.num_admitted += 1;
        }
        Ok(())
    }

    /// Chooses the number of draft tokens of each sequence that decodes, if the strategy leaves it
    /// open.
    fn choose_widths(&mut self) {
        let num_decoding = self.running.iter().take_while(|sequence| sequence.is_decoding()).count();
        let waits = self.prefill == PrefillPolicy::First && num_decoding < self.running.len();
        if num_decoding == 0 || waits || !self.options.strategy.has_chosen_width() {
            return;
        }
        let decoding = &mut self.running[..num_decoding];
        let strategy = self.options.strategy;
        let num_last_tokens: usize =
            decoding.iter().map(|sequence| strategy.num_forwarded(sequence.window().len())).sum();
        if self.chooser.rests(num_last_tokens) {
            return;
        }
        let (history, min_gain) = (&self.chooser.history, self.chooser.min_gain());
        let gains: Vec<Vec<f64>> = decoding.iter_mut().map(|sequence| sequence.gains(history, min_gain)).collect();
        let choice = self.chooser.choose(num_last_tokens, &gains, strategy.num_copies());
        for (sequence, num_drafts) in decoding.iter_mut().zip(choice.num_drafts) {
            sequence.set_num_drafts(num_drafts, choice.is_probe);
        }
    }

    /// Learns from a forward for the choices to come. `seconds` is its time if it had windows only.
    fn learn(&mut self, num_window_tokens: usize, seconds: Option<f64>) {
        if !self.options.strategy.has_chosen_width() {
            return;
        }
        if let Some(seconds) = seconds {
            self.chooser.observe_step(num_window_tokens, seconds);
        }
        for outcome in self.running.iter_mut().flat_map(Sequence::take_outcomes) {
            self.chooser.history.observe(outcome);
        }
    }

    /// The next chunk of each prompt: at most `budget` tokens in total.
    fn prompt_chunks(&self, mut budget: usize) -> Vec<PromptChunk<'_>> {
        let mut chunks = Vec::new();
        for (row, sequence) in self.running.iter().enumerate() {
            let (start, uncached) = (sequence.num_cached(), sequence.uncached_prompt());
            let tokens = &uncached[..uncached.len().min(budget)];
            budget -= tokens.len();
            if !tokens.is_empty() {
                chunks.push(PromptChunk { row, start, tokens });
            }
        }
        chunks
    }

    /// The windows of the leading sequences: those whose prompt was cached before this forward.
    fn windows(&self) -> Vec<Window<'_>> {
        self.running.iter().take_while(|sequence| sequence.is_decoding()).map(Sequence::window).collect()
    }

    /// Hands out the answers of finished sequences and fills the gaps that they leave, so that rows
    /// stay without gaps and the sequences that decode stay in front.
    fn evict_finished(&mut self, backend: &mut dyn Backend, events: &mut Events<'_>) -> Result<()> {
        let running = &mut self.running;
        let mut row = 0;
        while row < running.len() {
            if !running[row].is_finished() {
                row += 1;
                continue;
            }
            // The last decoding sequence fills the gap, and the last sequence of all fills that
            // one's gap.
            let last_decoding = running.iter().rposition(Sequence::is_decoding).unwrap_or(row);
            let last = running.len() - 1;
            running.swap(row, last_decoding);
            running.swap(last_decoding, last);
            if let Some(finished) = running.pop() {
                (events.on_finished)(finished.request_index(), finished.into_answer())?;
            }
            for (from, to) in [(last_decoding, row), (last, last_decoding)] {
                if from != to {
                    backend.copy_row(from, to)?;
                }
            }
        }
        Ok(())
    }
}
