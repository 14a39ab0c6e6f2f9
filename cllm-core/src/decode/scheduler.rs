//! The scheduler decides what runs in each forward. [`Scheduler::step`] is one forward from top to
//! bottom.

use std::time::Instant;

use super::backend::{Backend, Outputs, PromptChunk, Window};
use super::prefix_cache::PrefixCache;
use super::request::{Answer, Job, OnTokens, Timing};
use super::sequence::Sequence;
use super::strategy::Strategy;
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
    /// The same in smaller chunks, of all prompts at once, so that none of them waits for a longer
    /// one. Needs one row more than sequences.
    Shared,
}

/// Maximum number of prompt tokens of a forward with [`PrefillPolicy::Shared`]: sequences that decode
/// wait for them.
const MAX_SHARED_PROMPT_TOKENS: usize = 512;

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
    waiting: Box<dyn Iterator<Item = Result<Job>> + 'r>,
    num_admitted: usize,
    running: Vec<Sequence>,
    max_running: usize,
    strategy: Strategy,
    prefill: PrefillPolicy,
    prefixes: Option<PrefixCache>,
    chooser: &'r mut WindowChooser,
    timing: Timing,
}

impl<'r> Scheduler<'r> {
    /// Runs at most `max_running` of the waiting requests at once, all of which have this strategy.
    pub(super) fn new(
        waiting: impl Iterator<Item = Result<Job>> + 'r,
        max_running: usize,
        strategy: Strategy,
        prefill: PrefillPolicy,
        chooser: &'r mut WindowChooser,
    ) -> Self {
        let (waiting, running, timing) = (Box::new(waiting), Vec::new(), Timing::default());
        let prefixes = None;
        Scheduler { waiting, num_admitted: 0, running, max_running, strategy, prefill, prefixes, chooser, timing }
    }

    /// Keeps the beginnings of prompts and takes them from there.
    pub(super) fn with_prefixes(self, prefixes: PrefixCache) -> Self {
        Scheduler { prefixes: Some(prefixes), ..self }
    }

    pub(super) fn prefixes(&self) -> Option<&PrefixCache> {
        self.prefixes.as_ref()
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
        if self.prefill == PrefillPolicy::Shared {
            self.bring_decoding_to_front(backend)?;
        } else {
            // A server decides itself what it finishes after a signal.
            interrupt::check()?;
        }
        let started = Instant::now();

        // 2. Choose how many tokens each window drafts, if the strategy leaves that open.
        self.choose_widths();

        // 3. Cut the prompts that are not cached yet into chunks for this forward.
        let chunks = self.prompt_chunks(backend.max_prompt_tokens());
        let cached: Vec<(usize, usize)> = chunks.iter().map(|chunk| (chunk.row, chunk.tokens.len())).collect();

        // 4. Build the windows: the last token and the draft of each sequence whose prompt is cached.
        //    With `PrefillPolicy::First`, they wait until all prompts are cached.
        let windows = if self.prefill == PrefillPolicy::First && !chunks.is_empty() { vec![] } else { self.windows() };
        let strategy = self.strategy;
        let num_window_tokens: usize = windows.iter().map(|window| strategy.num_forwarded(window)).sum();
        let has_prompts = !chunks.is_empty();

        // 5. Forward. The backend samples a token after each token of each window.
        // Without drafts, there is nothing that candidates could be drafted after.
        let has_drafts = windows.iter().any(|window| !window.draft.is_empty());
        let candidates = has_drafts && strategy.needs_candidates();
        let outputs = Outputs { candidates };
        backend.launch(&chunks, &windows, outputs)?;
        let predictions = backend.collect(&windows)?;
        for (row, num_tokens) in cached {
            self.running[row].add_cached(num_tokens);
            if self.running[row].is_decoding() {
                self.store_prefix(row, backend)?;
            }
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
            let Some(job) = self.waiting.next() else { break };
            self.push(job?);
        }
        Ok(())
    }

    fn push(&mut self, Job { request, stop, options }: Job) {
        self.running.push(Sequence::new(self.num_admitted, request, stop, options));
        self.num_admitted += 1;
    }

    pub(super) fn has_room(&self) -> bool {
        self.running.len() < self.max_running
    }

    pub(super) fn num_running(&self) -> usize {
        self.running.len()
    }

    /// Admits a request into a free row, and returns how many tokens of its prompt were cached
    /// already. The caller makes sure that there is room.
    pub(super) fn join(&mut self, job: Job, backend: &mut dyn Backend) -> Result<usize> {
        let row = self.running.len();
        self.push(job);
        let Some(prefixes) = &mut self.prefixes else { return Ok(0) };
        let copies = prefixes.load(self.running[row].uncached_prompt(), row);
        copies.iter().try_for_each(|copy| backend.copy_slots(copy))?;
        let num_cached = copies.iter().map(|copy| copy.num_slots).sum();
        self.running[row].add_cached(num_cached);
        Ok(num_cached)
    }

    /// Ends the answer to a request where it is, and frees its row.
    pub(super) fn leave(&mut self, index: usize, backend: &mut dyn Backend) -> Result<()> {
        if let Some(sequence) = self.running.iter_mut().find(|sequence| sequence.request_index() == index) {
            sequence.cut();
        }
        self.evict_finished(backend, &mut Events { on_tokens: &mut |_, _| (), on_finished: &mut |_, _| Ok(()) })
    }

    fn store_prefix(&mut self, row: usize, backend: &mut dyn Backend) -> Result<()> {
        let Some(prefixes) = &mut self.prefixes else { return Ok(()) };
        let copies = prefixes.store(self.running[row].cached_tokens(), row);
        copies.iter().try_for_each(|copy| backend.copy_slots(copy))
    }

    /// Exchanges rows, through the one after those of the sequences, where a prompt was cached before
    /// that of an earlier sequence.
    fn bring_decoding_to_front(&mut self, backend: &mut dyn Backend) -> Result<()> {
        let mut num_decoding = 0;
        for row in 0..self.running.len() {
            if !self.running[row].is_decoding() {
                continue;
            }
            if row != num_decoding {
                for (from, to) in [(num_decoding, self.max_running), (row, num_decoding), (self.max_running, row)] {
                    backend.copy_row(from, to)?;
                }
                self.running.swap(row, num_decoding);
            }
            num_decoding += 1;
        }
        Ok(())
    }

    /// Chooses the number of draft tokens of each sequence that decodes, if the strategy leaves it
    /// open.
    fn choose_widths(&mut self) {
        let num_decoding = self.running.iter().take_while(|sequence| sequence.is_decoding()).count();
        let waits = self.prefill == PrefillPolicy::First && num_decoding < self.running.len();
        if num_decoding == 0 || waits || !self.strategy.has_chosen_width() {
            return;
        }
        let decoding = &mut self.running[..num_decoding];
        let strategy = self.strategy;
        let num_last_tokens: usize = decoding.iter().map(|sequence| strategy.num_forwarded(&sequence.window())).sum();
        if self.chooser.rests(num_last_tokens) {
            return;
        }
        let prospects = self.chooser.prospects();
        let gains: Vec<Vec<f64>> = decoding.iter_mut().map(|sequence| sequence.gains(&prospects)).collect();
        let choice = self.chooser.choose(num_last_tokens, &gains, strategy.num_copies());
        for (sequence, num_drafts) in decoding.iter_mut().zip(choice.num_drafts) {
            sequence.set_num_drafts(num_drafts, choice.is_probe);
        }
    }

    /// Learns from a forward for the choices to come. `seconds` is its time if it had windows only.
    fn learn(&mut self, num_window_tokens: usize, seconds: Option<f64>) {
        if !self.strategy.has_chosen_width() {
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
    fn prompt_chunks(&self, budget: usize) -> Vec<PromptChunk<'_>> {
        let lengths: Vec<usize> = self.running.iter().map(|sequence| sequence.uncached_prompt().len()).collect();
        let lengths = match self.prefill {
            PrefillPolicy::First | PrefillPolicy::Chunked => leading(&lengths, budget),
            PrefillPolicy::Shared => fair_shares(&lengths, budget.min(MAX_SHARED_PROMPT_TOKENS)),
        };
        let mut chunks = Vec::new();
        for (row, (sequence, length)) in self.running.iter().zip(lengths).enumerate() {
            let (start, tokens) = (sequence.num_cached(), &sequence.uncached_prompt()[..length]);
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
        let mut row = 0;
        while row < self.running.len() {
            if !self.running[row].is_finished() {
                row += 1;
                continue;
            }
            self.store_prefix(row, backend)?;
            // The last decoding sequence fills the gap of a decoding one, and the last sequence of all
            // fills that one's gap.
            let running = &mut self.running;
            let last_decoding = running.iter().rposition(Sequence::is_decoding).unwrap_or(row).max(row);
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

/// Numbers of tokens of at most these lengths: as many of the first as the budget allows.
fn leading(lengths: &[usize], mut budget: usize) -> Vec<usize> {
    let take = |&length: &usize| {
        let taken = length.min(budget);
        budget -= taken;
        taken
    };
    lengths.iter().map(take).collect()
}

/// Numbers of tokens of at most these lengths: the same of each, and what shorter ones leave of the
/// budget for the longer ones.
fn fair_shares(lengths: &[usize], mut budget: usize) -> Vec<usize> {
    let mut shares = vec![0; lengths.len()];
    let mut by_length: Vec<usize> = (0..lengths.len()).filter(|&index| lengths[index] > 0).collect();
    by_length.sort_by_key(|&index| lengths[index]);
    for (rank, &index) in by_length.iter().enumerate() {
        shares[index] = lengths[index].min(budget.div_ceil(by_length.len() - rank)).min(budget);
        budget -= shares[index];
    }
    shares
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_prompt_does_not_take_the_budget_of_short_ones() {
        assert_eq!(fair_shares(&[1000, 0, 10, 300], 512), [251, 0, 10, 251]);
        assert_eq!(fair_shares(&[5, 5, 5], 2), [1, 1, 0]);
        assert_eq!(fair_shares(&[3, 4], 512), [3, 4]);
        assert_eq!(leading(&[1000, 10], 512), [512, 0]);
    }
}
