//! Tests of the scheduler, sequences and proposers on a mock backend: exact, without weights.

use super::backend::gated::GatedBackend;
use super::backend::speculative::SpeculativeBackend;
use super::backend::{Backend, Outputs, Predictions, PromptChunk, Window};
use super::request::{Job, required_slots};
use super::sampling::{Candidate, Candidates, NO_CANDIDATES};
use super::scheduler::{Events, PrefillPolicy, Scheduler};
use super::sequence::{Accepted, Sequence};
use super::tree::Node;
use super::window_chooser::WindowChooser;
use super::{Answer, DecodeOptions, Request, StopConditions, Strategy, Width};
use crate::Result;
use crate::model::{SlotCopy, SlotMove};
use crate::thought::{Thought, ThoughtClosing, ThoughtLimit, ThoughtTokens};
use crate::trajectory::FinishReason;

/// Predicts the next token by a fixed rule from the whole sequence so far, and checks that chunks
/// and windows continue what is cached. A token of a window is predicted from the slots that it
/// sees; after one that is read with adapters, the candidates change places.
pub(super) struct MockBackend {
    /// The token in each slot of each row.
    rows: Vec<Vec<i32>>,
    /// Maximum number of slots of a row.
    capacity: usize,
    next_token: fn(&[i32]) -> i32,
    /// The candidate of the second rank.
    runner_up: fn(&[i32]) -> i32,
    pub(super) max_prompt_tokens: usize,
    /// The candidates after each token of all windows.
    predicted: Vec<Candidates>,
    with_candidates: bool,
    /// Number of forwards with both chunks and windows.
    pub(super) num_mixed: usize,
}

impl MockBackend {
    pub(super) fn new(num_rows: usize) -> Self {
        MockBackend {
            rows: vec![Vec::new(); num_rows],
            capacity: usize::MAX,
            next_token: hard,
            runner_up: repeating,
            max_prompt_tokens: usize::MAX,
            predicted: Vec::new(),
            with_candidates: false,
            num_mixed: 0,
        }
    }

    fn cache(&mut self, row: usize, start: usize, tokens: impl Iterator<Item = i32>) {
        let slots = &mut self.rows[row];
        assert!(start <= slots.len(), "row {row} leaves a gap in the cache");
        slots.truncate(start);
        slots.extend(tokens);
        assert!(slots.len() <= self.capacity, "row {row} has {} of {} slots", slots.len(), self.capacity);
    }
}

impl Backend for MockBackend {
    fn launch(&mut self, chunks: &[PromptChunk<'_>], windows: &[Window<'_>], outputs: Outputs) -> Result<()> {
        self.with_candidates = outputs.candidates;
        assert!(chunks.iter().all(|chunk| chunk.row >= windows.len() && !chunk.tokens.is_empty()));
        self.num_mixed += usize::from(!chunks.is_empty() && !windows.is_empty());
        for chunk in chunks {
            self.cache(chunk.row, chunk.start, chunk.tokens.iter().copied());
        }
        let predict = |(row, window): (usize, &Window<'_>)| {
            self.cache(row, window.start, window.tokens());
            let (before, tokens) = self.rows[row].split_at(window.start);
            let seen_by = |last: usize| {
                let Node { depth, visible, .. } = window.node(last);
                let is_seen = |&offset: &usize| offset >= 64 || visible >> offset & 1 == 1;
                let path: Vec<i32> = (0..=last).filter(is_seen).map(|offset| tokens[offset]).collect();
                assert_eq!(path.len(), depth + 1, "a token's position does not match the tokens that it sees");
                [before, &path].concat()
            };
            let candidates = |last| {
                let seen = seen_by(last);
                let mut candidates = NO_CANDIDATES;
                candidates[0] = Candidate { token: (self.next_token)(&seen), probability: 0.6 };
                let runner_up = (self.runner_up)(&seen);
                if runner_up != candidates[0].token {
                    candidates[1] = Candidate { token: runner_up, probability: 0.3 };
                    if last >= window.first_adapted() {
                        (candidates[0].token, candidates[1].token) = (candidates[1].token, candidates[0].token);
                    }
                }
                candidates
            };
            (0..window.len()).map(candidates).collect::<Vec<_>>()
        };
        self.predicted = windows.iter().enumerate().flat_map(predict).collect();
        Ok(())
    }

    fn collect(&mut self, windows: &[Window<'_>]) -> Result<Vec<Predictions>> {
        let mut predicted = self.predicted.iter().copied();
        let mut take = |window: &Window<'_>| {
            let candidates: Vec<Candidates> = predicted.by_ref().take(window.len()).collect();
            let tokens = candidates.iter().map(|candidates| candidates[0].token).collect();
            Predictions { tokens, candidates: if self.with_candidates { candidates } else { vec![] }, drafted: None }
        };
        Ok(windows.iter().map(&mut take).collect())
    }

    fn move_slots(&mut self, moves: &[SlotMove]) -> Result<()> {
        let read: Vec<i32> = moves.iter().map(|one| self.rows[one.row][one.from]).collect();
        for (one, token) in moves.iter().zip(read) {
            self.rows[one.row][one.to] = token;
        }
        Ok(())
    }

    fn copy_row(&mut self, from: usize, to: usize) -> Result<()> {
        self.rows[to] = self.rows[from].clone();
        Ok(())
    }

    fn copy_slots(&mut self, copy: &SlotCopy) -> Result<()> {
        let ((row, slot), num_slots) = (copy.from, copy.num_slots);
        let copied = self.rows[row][slot..slot + num_slots].to_vec();
        let (row, slot) = copy.to;
        let to = &mut self.rows[row];
        to.resize(to.len().max(slot + num_slots), -1);
        to[slot..slot + num_slots].copy_from_slice(&copied);
        Ok(())
    }

    fn max_prompt_tokens(&self) -> usize {
        self.max_prompt_tokens
    }
}

/// The backend that decodes with a strategy.
pub(super) fn backend_for(strategy: Strategy, model: &mut dyn Backend) -> Box<dyn Backend + '_> {
    if strategy.needs_draft_adapters() { Box::new(GatedBackend::new(model)) } else { Box::new(model) }
}

/// Depends on the last token, and for a third of the tokens on all of them: blocks converge in
/// fewer than n forwards, but not in one.
fn hard(tokens: &[i32]) -> i32 {
    let last = tokens[tokens.len() - 1];
    if last % 3 == 0 { (tokens.iter().sum::<i32>() * 7 + 5) % 29 } else { (last * 5 + 1) % 29 }
}

/// Depends only on the position, except for every sixth token: a consistency model's predictions
/// hardly depend on incorrect draft tokens either.
fn easy(tokens: &[i32]) -> i32 {
    let (length, last) = (tokens.len() as i32, tokens[tokens.len() - 1]);
    if length % 6 == 0 { (last * 5 + length) % 29 } else { length * 7 % 29 }
}

/// Repeats the same eleven tokens.
fn repeating(tokens: &[i32]) -> i32 {
    (tokens[tokens.len() - 1] + 1) % 11
}

fn requests() -> Vec<Request> {
    (1..=7)
        .map(|index| Request {
            sample_id: format!("s{index}"),
            prompt_ids: (0..index).map(|i| i * 3 + index).collect(),
        })
        .collect()
}

/// Answers all requests at once; the answers are in the order of the requests.
fn answers(strategy: Strategy, stop: &StopConditions) -> Vec<Answer> {
    run(&mut MockBackend::new(7), 7, strategy, stop, PrefillPolicy::First, &mut |_, _| ())
}

fn answers_by(next_token: fn(&[i32]) -> i32, strategy: Strategy, stop: &StopConditions) -> Vec<Answer> {
    let mut backend = MockBackend { next_token, ..MockBackend::new(7) };
    run(&mut backend, 7, strategy, stop, PrefillPolicy::First, &mut |_, _| ())
}

fn run(
    backend: &mut dyn Backend,
    max_running: usize,
    strategy: Strategy,
    stop: &StopConditions,
    prefill: PrefillPolicy,
    on_tokens: &mut dyn FnMut(usize, &[i32]),
) -> Vec<Answer> {
    let options = DecodeOptions { record_trajectory: true, ..DecodeOptions::greedy(strategy, 1) };
    let mut answers = vec![None; requests().len()];
    let mut on_finished = |index: usize, answer| {
        assert!(answers[index].replace(answer).is_none(), "request {index} was answered twice");
        Ok(())
    };
    let mut events = Events { on_tokens, on_finished: &mut on_finished };
    let waiting = requests().into_iter().map(|request| Ok(Job { request, stop: stop.clone(), options }));
    let mut chooser = WindowChooser::default();
    let mut backend = backend_for(strategy, backend);
    Scheduler::new(waiting, max_running, strategy, prefill, &mut chooser).run(backend.as_mut(), &mut events).unwrap();
    answers.into_iter().map(Option::unwrap).collect()
}

fn total_forwards(answers: &[Answer]) -> usize {
    answers.iter().map(|answer| answer.num_forwards).sum()
}

/// Every strategy, in several sizes.
pub(super) fn strategies() -> Vec<Strategy> {
    let with_n = |n| {
        [
            Strategy::Jacobi { n },
            Strategy::rolling(n),
            Strategy::Rolling { n: Width::Fixed(n), tree: 0, pool: 3 },
            Strategy::multi_block(n),
            Strategy::MultiBlock { n, blocks: 3, ratio: 0.4, pool: 4 },
        ]
    };
    let lookahead = [(1, 2, 1), (1, 3, 3), (4, 2, 2), (5, 4, 5), (10, 5, 6), (3, 16, 1)];
    let lookahead = lookahead.map(|(window, ngram, candidates)| Strategy::Lookahead { window, ngram, candidates });
    let trees = [(2, 3), (3, 20), (8, 64), (16, 17)];
    let trees = trees.map(|(n, tree)| Strategy::Rolling { n: Width::Fixed(n), tree, pool: 0 });
    let chosen = [0, 2, 16, 64].map(Strategy::auto);
    let without_adapters = [2, 3, 8, 16, 64].into_iter().flat_map(with_n).chain(lookahead).chain(trees).chain(chosen);
    without_adapters.chain(gated_strategies()).collect()
}

fn gated_strategies() -> impl Iterator<Item = Strategy> {
    let trees = [(Width::Fixed(3), 20), (Width::Fixed(31), 32), (Width::Auto, 0), (Width::Auto, 16)];
    [2, 3, 8, 32].map(Strategy::gated).into_iter().chain(trees.map(|(n, tree)| Strategy::Gated { n, tree }))
}

pub(super) fn stop() -> StopConditions {
    StopConditions::new(40, vec![14, 5])
}

fn stop_after(max_new_tokens: usize) -> StopConditions {
    StopConditions::new(max_new_tokens, vec![])
}

#[test]
fn every_strategy_gives_the_greedy_answer_in_no_more_forwards() {
    let greedy = answers(Strategy::Ar, &stop());
    assert!(greedy.iter().any(|answer| answer.finish_reason == FinishReason::Eos));
    assert!(greedy.iter().all(|answer| answer.num_forwards == answer.response_ids.len()));
    for strategy in strategies() {
        assert!(strategy.check().is_ok(), "{strategy:?}");
        for (answer, greedy) in answers(strategy, &stop()).iter().zip(&greedy) {
            assert_eq!(answer.response_ids, greedy.response_ids, "{strategy:?}");
            assert_eq!(answer.finish_reason, greedy.finish_reason);
            assert!(answer.num_forwards <= greedy.num_forwards);
            assert_eq!(answer.num_new_tokens.iter().sum::<u32>() as usize, answer.response_ids.len());
        }
    }
}

fn sequence(prompt_ids: Vec<i32>, stop: &StopConditions, strategy: Strategy) -> Sequence {
    Sequence::new(0, Request { sample_id: "a".into(), prompt_ids }, stop.clone(), DecodeOptions::greedy(strategy, 1))
}

fn predictions(tokens: &[i32]) -> Predictions {
    Predictions { tokens: tokens.to_vec(), candidates: Vec::new(), drafted: None }
}

#[test]
fn a_rolling_window_drafts_what_was_proposed_and_keeps_its_length() {
    let stop = stop();
    let mut sequence = sequence(vec![1, 2, 3], &stop, Strategy::rolling(4));
    let window = sequence.window();
    assert_eq!((window.start, window.last_token, window.draft.len()), (2, 3, 3));
    // The first draft token is accepted and the second is not, so two tokens are new; the proposals
    // after them stay.
    let (first, other) = (window.draft[0], window.draft[1] + 1);
    let proposed = Predictions { drafted: Some(vec![31, 32, 33, 34]), ..predictions(&[first, other, 21, 22]) };
    assert_eq!(sequence.accept(&proposed).tokens, [first, other]);
    let window = sequence.window();
    assert_eq!((window.last_token, &window.draft[..2]), (other, &[33, 34][..]));
    assert!(window.draft.len() == 3 && [1, 2, 3, first, other].contains(&window.draft[2]));
}

#[test]
fn a_draft_model_changes_the_number_of_forwards_and_never_the_answer() {
    let answers_with = |next_token: fn(&[i32]) -> i32| {
        let (mut target, mut draft) = (MockBackend::new(3), MockBackend { next_token, ..MockBackend::new(3) });
        let mut both = SpeculativeBackend::new(&mut target, &mut draft);
        run(&mut both, 3, Strategy::Drafted { n: 8 }, &stop(), PrefillPolicy::Chunked, &mut |_, _| ())
    };
    let greedy = answers(Strategy::Ar, &stop());
    let rolling = answers(Strategy::rolling(8), &stop());
    // A draft model equal to the target saves as many forwards as a rolling window; another one
    // saves fewer.
    let (same_model, other_model) = (answers_with(hard), answers_with(repeating));
    for (index, greedy) in greedy.iter().enumerate() {
        assert_eq!(same_model[index].response_ids, greedy.response_ids);
        assert_eq!(same_model[index].num_forwards, rolling[index].num_forwards);
        assert_eq!(other_model[index].response_ids, greedy.response_ids);
    }
    assert!(total_forwards(&same_model) < total_forwards(&other_model), "the draft model makes no difference");
}

#[test]
fn a_block_begins_when_the_newest_is_nearly_accepted_and_moves_to_the_front() {
    let stop = stop_after(40);
    let mut sequence = sequence(vec![1, 2, 3], &stop, Strategy::MultiBlock { n: 4, blocks: 2, ratio: 0.75, pool: 0 });
    // Accepts the given number of draft tokens, and no others; returns the length of the next
    // draft.
    let mut accept = |num_accepted: usize| {
        let draft = sequence.window().draft.to_vec();
        let token = |offset| if offset < num_accepted { draft[offset] } else { 100 + offset as i32 };
        sequence.accept(&predictions(&(0..=draft.len()).map(token).collect::<Vec<_>>()));
        sequence.window().draft.len()
    };
    // The first token of the block is final from the start. With two final, two remain.
    assert_eq!(accept(0), 2);
    // Three of four final tokens let the next block begin.
    assert_eq!(accept(0), 1 + 4);
    // The front block is final and the next one moves to the front, with its first token final.
    assert_eq!(accept(1), 3);
    // The rest of this block and the first token of the next.
    assert_eq!(accept(3), 3);
}

#[test]
fn multi_block_with_a_pool_takes_fewer_forwards_than_a_rolling_window() {
    let stop = stop_after(200);
    let forwards = |next_token, strategy| total_forwards(&answers_by(next_token, strategy, &stop));
    for n in [3, 4, 8, 16, 32] {
        let with_pool = Strategy::MultiBlock { n, blocks: 2, ratio: 0.85, pool: 4 };
        let (blocks, rolling) = (forwards(hard, with_pool), forwards(hard, Strategy::rolling(n)));
        assert!(blocks < rolling, "n = {n}: {blocks} forwards, a rolling window takes {rolling}");
        // When predictions hardly depend on the draft, tokens beyond the border of a block are
        // accepted as well.
        let (blocks, one) = (forwards(easy, Strategy::multi_block(n)), forwards(easy, Strategy::Jacobi { n }));
        assert!(blocks < one, "n = {n}: {blocks} forwards, one block at a time takes {one}");
    }
}

/// The next token is one of two of its position, which the sum of the last two tokens decides. After
/// an incorrect draft token, the correct one is often the other.
fn either(tokens: &[i32]) -> i32 {
    let (odd, [first, second]) = either_of(tokens);
    if odd { first } else { second }
}

fn the_other(tokens: &[i32]) -> i32 {
    let (odd, [first, second]) = either_of(tokens);
    if odd { second } else { first }
}

fn either_of(tokens: &[i32]) -> (bool, [i32; 2]) {
    let last_two: i32 = tokens.iter().rev().take(2).sum();
    let position = tokens.len() as i32;
    (last_two % 2 == 1, [position * 7 % 29, (position * 11 + 3) % 31])
}

#[test]
fn a_tree_of_the_likeliest_paths_takes_fewer_forwards_than_its_chain() {
    let forwards = |tree| {
        let stop = stop_after(200);
        let strategy = Strategy::Rolling { n: Width::Fixed(8), tree, pool: 0 };
        let mut backend = MockBackend { next_token: either, runner_up: the_other, ..MockBackend::new(7) };
        let answers = run(&mut backend, 7, strategy, &stop, PrefillPolicy::First, &mut |_, _| ());
        let greedy = answers_by(either, Strategy::Ar, &stop);
        assert!(answers.iter().zip(&greedy).all(|(a, b)| a.response_ids == b.response_ids));
        let num_tokens: u64 = answers.iter().map(|answer| answer.num_window_tokens).sum();
        let num_forwards = total_forwards(&answers);
        // Random tokens have no others beside them.
        let max_tokens = num_forwards as u64 * tree.max(8) as u64;
        assert!((max_tokens * 3 / 4..=max_tokens).contains(&num_tokens), "{num_tokens} of {max_tokens} tokens");
        num_forwards
    };
    let (chain, small, large) = (forwards(0), forwards(16), forwards(64));
    assert!(small * 10 < chain * 9 && large < small, "{chain} forwards as a chain, {small} and {large} as trees");
}

/// A lookahead window of 3 columns and 2 levels with one candidate, after the prompt 7 8 9 7.
fn lookahead_sequence(stop: &StopConditions) -> Sequence {
    sequence(vec![7, 8, 9, 7], stop, Strategy::Lookahead { window: 3, ngram: 3, candidates: 1 })
}

/// Predictions that accept the candidate of [`lookahead_sequence`] and nothing of its lookahead
/// branch.
fn predictions_of_candidate(sequence: &Sequence) -> Predictions {
    let tokens: Vec<i32> = sequence.window().tokens().collect();
    assert_eq!((tokens.len(), tokens[0]), (8, 7));
    assert_eq!(tokens[6..], [8, 9], "the candidate is what followed 7 in the prompt");
    let mut predicted = vec![8, 101, 102, 103, 104, 105, 9, 7];
    // Random tokens of the lookahead branch may equal the candidate's first token by chance.
    if tokens[1] == 8 || tokens[3] == 8 {
        predicted[1] = -1;
        predicted[3] = -1;
    }
    predictions(&predicted)
}

#[test]
fn a_lookahead_window_is_a_tree_of_columns_and_candidates() {
    let stop = stop();
    let mut sequence = lookahead_sequence(&stop);
    let window = sequence.window();
    let nodes: Vec<(usize, usize)> =
        (0..window.len()).map(|offset| window.node(offset)).map(|node| (node.parent, node.depth)).collect();
    assert_eq!(nodes, [(0, 0), (0, 1), (1, 2), (0, 1), (1, 2), (2, 3), (0, 1), (6, 2)]);
    let old: Vec<i32> = sequence.window().tokens().collect();
    let predictions = predictions_of_candidate(&sequence);
    let Accepted { tokens, moves, .. } = sequence.accept(&predictions);
    assert_eq!(tokens, [8, 9, 7]);
    // The candidate's tokens are at offsets 6 and 7; they move to the slots after that of the first
    // token.
    assert_eq!(moves, [(3 + 6, 3 + 1), (3 + 7, 3 + 2)]);
    // Three tokens are new, so the columns at the positions of the first two are over and the third
    // becomes the first.
    let new: Vec<i32> = sequence.window().tokens().collect();
    assert_eq!((new[0], new[3]), (7, predictions.tokens[5]));
    assert!(new[1..3].iter().chain(&new[4..6]).all(|token| [7, 8, 9].contains(token)), "other columns are random");
    // The forward completed an n-gram in each column; the newest that begins with 7 is the first
    // column's.
    assert_eq!(&new[6..], [old[3], predictions.tokens[3]]);
}

#[test]
fn an_answer_ends_at_an_eos_or_the_limit_inside_an_accepted_candidate() {
    for (stop, response, reason) in [
        (StopConditions::new(40, vec![9]), &[8, 9][..], FinishReason::Eos),
        (stop_after(2), &[8, 9], FinishReason::Length),
        (StopConditions::new(1, vec![8]), &[8], FinishReason::Eos),
    ] {
        let mut sequence = lookahead_sequence(&stop);
        let predictions = predictions_of_candidate(&sequence);
        assert_eq!(sequence.accept(&predictions).tokens, response);
        let answer = sequence.into_answer();
        assert_eq!((&answer.response_ids[..], answer.finish_reason), (response, reason));
        assert_eq!(answer.num_new_tokens, [response.len() as u32]);
    }
}

#[test]
fn lookahead_takes_far_fewer_forwards_when_text_repeats() {
    let stop = stop_after(200);
    let (greedy, lookahead) =
        (answers_by(repeating, Strategy::Ar, &stop), answers_by(repeating, Strategy::lookahead(), &stop));
    assert!(lookahead.iter().zip(&greedy).all(|(a, b)| a.response_ids == b.response_ids));
    let (num_greedy, num_lookahead) = (total_forwards(&greedy), total_forwards(&lookahead));
    assert_eq!(num_greedy, 7 * 200);
    // At best a forward accepts a candidate of three tokens and adds the one after it.
    assert!(num_lookahead < num_greedy * 2 / 5, "{num_lookahead} forwards, greedy takes {num_greedy}");
}

#[test]
fn an_answer_ends_at_the_first_eos_or_at_the_limit() {
    let stop = StopConditions::new(5, vec![14, 5]);
    for answer in answers(Strategy::Jacobi { n: 8 }, &stop) {
        let ids = &answer.response_ids;
        let eos = ids.iter().position(|id| stop.eos_ids.contains(id));
        match answer.finish_reason {
            FinishReason::Eos => assert_eq!(eos, Some(ids.len() - 1)),
            FinishReason::Length => assert!(eos.is_none() && ids.len() == 5),
        }
    }
}

#[test]
fn blocks_join_to_the_answer_and_their_states_lead_to_the_fixed_point() {
    let n = 8;
    for answer in answers(Strategy::Jacobi { n }, &stop()) {
        let mut joined: Vec<i32> = Vec::new();
        for block in &answer.blocks {
            assert_eq!(block.start as usize, joined.len());
            assert!(block.states.iter().all(|state| state.len() == n));
            assert!(block.states.windows(2).all(|pair| pair[0] != pair[1]), "a repeated state was stored");
            let fixed_point = block.states.last().unwrap();
            joined.extend(fixed_point);
            let num_correct = |state: &[i32]| state.iter().zip(fixed_point).take_while(|(a, b)| a == b).count();
            for pair in block.states.windows(2) {
                assert!(num_correct(&pair[1]) > num_correct(&pair[0]), "a forward fixes at least one token");
            }
        }
        joined.truncate(answer.response_ids.len());
        assert_eq!(joined, answer.response_ids);
    }
}

#[test]
fn initial_drafts_depend_only_on_the_tokens_so_far_and_the_seed() {
    let first = answers(Strategy::Jacobi { n: 8 }, &stop());
    let again = answers(Strategy::Jacobi { n: 8 }, &stop());
    for ((a, b), request) in first.iter().zip(&again).zip(requests()) {
        assert_eq!(a.blocks, b.blocks);
        let state = &a.blocks[0].states[0];
        let seen: Vec<i32> = request.prompt_ids.iter().copied().chain([state[0]]).collect();
        assert!(state[1..].iter().all(|token| seen.contains(token)));
    }
}

#[test]
fn the_caller_gets_every_token_once_and_in_order() {
    let mut seen = vec![Vec::new(); requests().len()];
    let mut on_tokens = |index: usize, new: &[i32]| seen[index].extend_from_slice(new);
    let strategy = Strategy::Jacobi { n: 4 };
    let answers = run(&mut MockBackend::new(7), 7, strategy, &stop(), PrefillPolicy::First, &mut on_tokens);
    assert!(answers.iter().zip(&seen).all(|(answer, seen)| &answer.response_ids == seen));
}

#[test]
fn answers_do_not_depend_on_the_batch_or_on_when_prompts_are_cached() {
    let some = [
        Strategy::Ar,
        Strategy::Jacobi { n: 8 },
        Strategy::Rolling { n: Width::Fixed(5), tree: 0, pool: 2 },
        Strategy::multi_block(4),
    ];
    let branching = [Strategy::lookahead(), Strategy::Rolling { n: Width::Fixed(4), tree: 12, pool: 0 }];
    let gated = gated_strategies().filter(|strategy| !strategy.has_chosen_width());
    for strategy in some.into_iter().chain(branching).chain(gated) {
        let together = answers(strategy, &stop());
        let sizes = [(1, usize::MAX), (2, 1), (3, 4), (5, usize::MAX)];
        let policies = [PrefillPolicy::First, PrefillPolicy::Chunked];
        for (policy, (num_rows, max_prompt_tokens)) in
            policies.into_iter().flat_map(|one| sizes.map(|size| (one, size)))
        {
            let mut backend = MockBackend { max_prompt_tokens, ..MockBackend::new(num_rows) };
            let in_turn = run(&mut backend, num_rows, strategy, &stop(), policy, &mut |_, _| ());
            for (in_turn, together) in in_turn.iter().zip(&together) {
                assert_eq!(in_turn.response_ids, together.response_ids, "{strategy:?} in {num_rows} rows");
                assert_eq!(in_turn.num_new_tokens, together.num_new_tokens);
                assert_eq!(in_turn.blocks, together.blocks);
            }
            // One row has no other sequences to decode while its prompt is cached.
            assert_eq!(backend.num_mixed > 0, policy == PrefillPolicy::Chunked && num_rows > 1, "{policy:?}");
        }
    }
}

/// Conditions under which every answer begins with a thought, which token 4 ends and which is closed
/// after 12 tokens.
fn stop_with_thought_limit() -> StopConditions {
    let tokens = ThoughtTokens::new(101, 4, vec![vec![]]);
    let closing = ThoughtClosing { max_thinking_tokens: 12, closing_ids: vec![30, 4, 31] };
    StopConditions { thought_limit: Some(ThoughtLimit { tokens, closing }), ..StopConditions::new(40, vec![5]) }
}

#[test]
fn every_strategy_closes_a_thought_at_the_limit_and_no_other() {
    let stop = stop_with_thought_limit();
    let unlimited = answers(Strategy::Ar, &StopConditions::new(40, vec![5]));
    let ar = answers(Strategy::Ar, &stop);
    let is_forced = |answer: &Answer| answer.thought == Some(Thought::Forced(12..15));
    assert!(ar.iter().any(is_forced), "{ar:?}");
    assert!(ar.iter().any(|answer| answer.thought == Some(Thought::Closed)), "{ar:?}");
    for (limited, unlimited) in ar.iter().zip(&unlimited) {
        let num_forced = if is_forced(limited) { 3 } else { 0 };
        assert_eq!(limited.num_decoded_tokens() + num_forced, limited.response_ids.len());
        assert_eq!(limited.num_forwards, limited.num_decoded_tokens(), "a forward decodes one token");
        assert_eq!(unlimited.thought, None);
        if is_forced(limited) {
            assert_eq!(limited.response_ids[..12], unlimited.response_ids[..12]);
            assert_eq!(limited.response_ids[12..15], [30, 4, 31]);
        } else {
            assert_eq!(limited.response_ids, unlimited.response_ids);
        }
    }
    for strategy in strategies() {
        for (answer, ar) in answers(strategy, &stop).iter().zip(&ar) {
            assert_eq!((&answer.response_ids, &answer.thought), (&ar.response_ids, &ar.thought), "{strategy:?}");
            assert_eq!(answer.finish_reason, ar.finish_reason);
            assert!(answer.num_forwards <= ar.num_forwards, "{strategy:?}");
        }
        // Neither the batch nor the time at which prompts are cached matters.
        let mut backend = MockBackend { max_prompt_tokens: 3, ..MockBackend::new(2) };
        let streamed = run(&mut backend, 2, strategy, &stop, PrefillPolicy::Chunked, &mut |_, _| ());
        for (streamed, together) in streamed.iter().zip(answers(strategy, &stop)) {
            assert_eq!(streamed.response_ids, together.response_ids, "{strategy:?}");
            // A width that is chosen depends on the batch and on measured times.
            if !strategy.has_chosen_width() {
                assert_eq!(streamed.num_new_tokens, together.num_new_tokens);
            }
            assert_eq!(streamed.blocks, together.blocks);
        }
    }
}

#[test]
fn no_window_needs_more_slots_than_are_required() {
    // A thought whose closing is longer than the window of some strategies, and leaves one token.
    let mut closing_thought = stop_with_thought_limit();
    if let Some(limit) = &mut closing_thought.thought_limit {
        limit.closing.closing_ids = [[30; 8], [4; 8]].concat();
        closing_thought.max_new_tokens = limit.closing.max_thinking_tokens + 16 + 1;
    }
    for strategy in strategies().into_iter().chain([Strategy::Ar]) {
        for stop in [stop_after(40), closing_thought.clone()] {
            let max_prompt_tokens = requests().iter().map(|request| request.prompt_ids.len()).max().unwrap();
            let capacity = required_slots(max_prompt_tokens, &stop, strategy);
            let mut backend = MockBackend { capacity, ..MockBackend::new(7) };
            let answers = run(&mut backend, 7, strategy, &stop, PrefillPolicy::First, &mut |_, _| ());
            assert!(answers.iter().any(|answer| answer.response_ids.len() == stop.max_new_tokens), "{strategy:?}");
        }
    }
}

#[test]
fn an_answer_goes_on_after_a_closed_thought_as_after_a_prompt() {
    let stop = stop_with_thought_limit();
    for answer in answers(Strategy::Jacobi { n: 4 }, &stop).iter().filter(|answer| answer.response_ids.len() > 15) {
        let starts: Vec<usize> = answer.blocks.iter().map(|block| block.start as usize).collect();
        let forced = answer.thought == Some(Thought::Forced(12..15));
        let expected = (0..answer.response_ids.len())
            .step_by(4)
            .map(|start| if forced && start >= 12 { start + 3 } else { start });
        assert_eq!(starts, expected.take(starts.len()).collect::<Vec<_>>());
        for block in &answer.blocks {
            let start = block.start as usize;
            let len = (answer.response_ids.len() - start).min(4);
            assert_eq!(block.states.last().unwrap()[..len], answer.response_ids[start..start + len]);
        }
    }
}
