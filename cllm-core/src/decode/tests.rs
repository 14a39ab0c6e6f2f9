//! The decoding loop on a made-up model: exact, no weights.

use super::backend::speculative::Drafted;
use super::sequence::Accepted;
use super::*;

/// Predicts from the whole sequence so far by a fixed rule; checks that chunks and windows follow what is cached. A token of a
/// window is predicted from the slots that it sees.
struct Rule {
    /// By slot.
    sequences: Vec<Vec<i32>>,
    next: fn(&[i32]) -> i32,
    /// Tokens of prompts that a step takes.
    prompt_tokens: usize,
    chosen: Vec<i32>,
}

impl Rule {
    fn new(rows: usize) -> Self {
        Rule { sequences: vec![Vec::new(); rows], next: hard, prompt_tokens: usize::MAX, chosen: Vec::new() }
    }

    fn cache(&mut self, row: usize, start: usize, tokens: impl Iterator<Item = i32>) {
        let cached = &mut self.sequences[row];
        assert!(start <= cached.len(), "row {row} leaves a hole in the cache");
        cached.truncate(start);
        cached.extend(tokens);
    }
}

impl Forward for Rule {
    fn begin(&mut self, chunks: &[Chunk<'_>], windows: &[Window<'_>], _: Sampling) -> Result<()> {
        assert!(windows.iter().enumerate().all(|(row, window)| window.row == row));
        assert!(chunks.iter().all(|chunk| chunk.row >= windows.len() && !chunk.tokens.is_empty()));
        for chunk in chunks {
            self.cache(chunk.row, chunk.start, chunk.tokens.iter().copied());
        }
        let predict = |window: &Window<'_>| {
            self.cache(window.row, window.start, window.tokens());
            let (known, tokens) = self.sequences[window.row].split_at(window.start);
            let seen = |last: usize| {
                let Place { depth, visible, .. } = window.place(last);
                let sees = |&offset: &usize| offset >= 64 || visible >> offset & 1 == 1;
                let path: Vec<i32> = (0..=last).filter(sees).map(|offset| tokens[offset]).collect();
                assert_eq!(path.len(), depth + 1, "a token's position is not that of its sequence");
                [known, &path].concat()
            };
            (0..window.len()).map(|last| (self.next)(&seen(last))).collect::<Vec<_>>()
        };
        self.chosen = windows.iter().flat_map(predict).collect();
        Ok(())
    }

    fn finish(&mut self, windows: &[Window<'_>]) -> Result<Vec<Predicted>> {
        Ok(Predicted::each(windows, &self.chosen))
    }

    fn move_slots(&mut self, moves: &[SlotMove]) -> Result<()> {
        let read: Vec<i32> = moves.iter().map(|one| self.sequences[one.row][one.from]).collect();
        for (one, token) in moves.iter().zip(read) {
            self.sequences[one.row][one.to] = token;
        }
        Ok(())
    }

    fn copy_row(&mut self, from: usize, to: usize) -> Result<()> {
        self.sequences[to] = self.sequences[from].clone();
        Ok(())
    }

    fn prompt_tokens(&self) -> usize {
        self.prompt_tokens
    }
}

/// Mostly depends on the last token, at times on the sum of all: converges in fewer than n steps, but not in one.
fn hard(sequence: &[i32]) -> i32 {
    let last = sequence[sequence.len() - 1];
    if last % 3 == 0 { (sequence.iter().sum::<i32>() * 7 + 5) % 29 } else { (last * 5 + 1) % 29 }
}

/// Depends on the position, but for every sixth one, as the predictions of a consistency model hardly depend on wrong guesses.
fn easy(sequence: &[i32]) -> i32 {
    let (length, last) = (sequence.len() as i32, sequence[sequence.len() - 1]);
    if length % 6 == 0 { (last * 5 + length) % 29 } else { length * 7 % 29 }
}

/// Goes through the same eleven tokens again and again.
fn repeating(sequence: &[i32]) -> i32 {
    (sequence[sequence.len() - 1] + 1) % 11
}

fn requests() -> Vec<Request> {
    (1..=7)
        .map(|index| Request {
            sample_id: format!("s{index}"),
            prompt_ids: (0..index).map(|i| i * 3 + index).collect(),
        })
        .collect()
}

fn answers(strategy: Strategy, stop: &StopConditions) -> Vec<Answer> {
    run(&mut Rule::new(7), 7, strategy, stop, Prefill::First, &mut |_, _| ())
}

/// Answers in the order of the requests.
fn run(
    model: &mut dyn Forward,
    room: usize,
    strategy: Strategy,
    stop: &StopConditions,
    prefill: Prefill,
    new_tokens: Watcher<'_>,
) -> Vec<Answer> {
    let options = DecodeOptions { record_trajectory: true, ..DecodeOptions::greedy(strategy, 1) };
    let mut answers = vec![None; requests().len()];
    let mut finished = |index: usize, answer| {
        assert!(answers[index].replace(answer).is_none(), "answered twice");
        Ok(())
    };
    let mut events = Events { new_tokens, finished: &mut finished };
    converge(model, room, &mut requests().into_iter().map(Ok), stop, options, prefill, &mut events).unwrap();
    answers.into_iter().map(Option::unwrap).collect()
}

/// Each strategy in several sizes.
fn strategies() -> Vec<Strategy> {
    let of_n = |n| {
        [
            Strategy::Jacobi { n },
            Strategy::rolling(n),
            Strategy::Rolling { n, pool: 3 },
            Strategy::multi_block(n),
            Strategy::MultiBlock { n, blocks: 3, ratio: 0.4, pool: 4 },
        ]
    };
    let lookahead = [(1, 2, 1), (1, 3, 3), (4, 2, 2), (5, 4, 5), (10, 5, 6), (3, 16, 1)];
    let lookahead = lookahead.map(|(window, ngram, candidates)| Strategy::Lookahead { window, ngram, candidates });
    [2, 3, 8, 16, 64].into_iter().flat_map(of_n).chain(lookahead).collect()
}

fn stop() -> StopConditions {
    StopConditions { max_new_tokens: 40, eos_ids: vec![14, 5] }
}

#[test]
fn every_strategy_gives_the_greedy_answer_in_no_more_forwards() {
    let greedy = answers(Strategy::Ar, &stop());
    assert!(greedy.iter().any(|a| a.finish_reason == FinishReason::Eos));
    assert!(greedy.iter().all(|a| a.num_forwards == a.response_ids.len()));
    for strategy in strategies() {
        for (several, greedy) in answers(strategy, &stop()).iter().zip(&greedy) {
            assert_eq!(several.response_ids, greedy.response_ids, "{strategy:?}");
            assert_eq!(several.finish_reason, greedy.finish_reason);
            assert!(several.num_forwards <= greedy.num_forwards);
            assert_eq!(several.num_accepted.iter().sum::<u32>() as usize, several.response_ids.len());
        }
    }
}

#[test]
fn a_rolling_window_keeps_its_predictions_and_never_shrinks() {
    let request = Request { sample_id: "a".into(), prompt_ids: vec![1, 2, 3] };
    let stop = stop();
    let mut row = Row::new(request, &stop, DecodeOptions::greedy(Strategy::rolling(4), 1));
    assert_eq!((row.window(0).start, row.window(0).known, row.window(0).guesses.len()), (2, 3, 3));
    let first = row.window(0).guesses[0];
    // The first guess is right, the second is not: two tokens are final, and what was drafted after them stays.
    let wrong = row.window(0).guesses[1] + 1;
    assert_eq!(row.accept(&[first, wrong, 21, 22], &[31, 32, 33, 34]).tokens, [first, wrong]);
    assert_eq!((row.window(0).known, &row.window(0).guesses[..2]), (wrong, &[33, 34][..]));
    assert!(row.window(0).guesses.len() == 3 && [1, 2, 3, first, wrong].contains(&row.window(0).guesses[2]));
}

#[test]
fn another_model_guesses_and_the_models_own_answer_comes() {
    let with = |guess: fn(&[i32]) -> i32| {
        let (mut model, mut draft_model) = (Rule::new(3), Rule { next: guess, ..Rule::new(3) });
        let mut both = Drafted::new(&mut model, &mut draft_model);
        run(&mut both, 3, Strategy::Drafted { n: 8 }, &stop(), Prefill::Beside, &mut |_, _| ())
    };
    let greedy = answers(Strategy::Ar, &stop());
    let own = answers(Strategy::rolling(8), &stop());
    // What guesses like the model itself saves what a rolling window saves; what guesses otherwise saves less.
    let (alike, otherwise) = (with(hard), with(repeating));
    for (index, plain) in greedy.iter().enumerate() {
        assert_eq!(alike[index].response_ids, plain.response_ids);
        assert_eq!(alike[index].num_forwards, own[index].num_forwards);
        assert_eq!(otherwise[index].response_ids, plain.response_ids);
    }
    let forwards = |answers: &[Answer]| answers.iter().map(|answer| answer.num_forwards).sum::<usize>();
    assert!(forwards(&alike) < forwards(&otherwise), "whose guesses they are makes no difference");
}

#[test]
fn blocks_begin_as_the_newest_is_nearly_done_and_move_up() {
    let request = Request { sample_id: "a".into(), prompt_ids: vec![1, 2, 3] };
    let stop = StopConditions { max_new_tokens: 40, eos_ids: vec![] };
    let strategy = Strategy::MultiBlock { n: 4, blocks: 2, ratio: 0.75, pool: 0 };
    let mut row = Row::new(request, &stop, DecodeOptions::greedy(strategy, 1));
    // Predictions that agree with so many leading guesses, and with none behind.
    let mut accept = |matched: usize| {
        let guesses = row.window(0).guesses.to_vec();
        let predicted = (0..=guesses.len()).map(|at| if at < matched { guesses[at] } else { 100 + at as i32 });
        let predicted: Vec<i32> = predicted.collect();
        row.accept(&predicted, &predicted);
        row.window(0).guesses.len()
    };
    // One token of the block is known, so two are then; 3 of 4 let the next block begin; its end moves it up.
    assert_eq!(accept(0), 2);
    assert_eq!(accept(0), 1 + 4);
    assert_eq!(accept(1), 3);
    // The rest of this block and the first token of the next.
    assert_eq!(accept(3), 3);
}

#[test]
fn several_blocks_with_a_pool_take_no_more_forwards_than_a_rolling_window() {
    let stop = StopConditions { max_new_tokens: 200, eos_ids: vec![] };
    let forwards = |next, strategy| {
        let answers = run(&mut Rule { next, ..Rule::new(7) }, 7, strategy, &stop, Prefill::First, &mut |_, _| ());
        answers.iter().map(|answer| answer.num_forwards).sum::<usize>()
    };
    for n in [3, 4, 8, 16, 32] {
        let with_pool = Strategy::MultiBlock { n, blocks: 2, ratio: 0.85, pool: 4 };
        let (blocks, rolling) = (forwards(hard, with_pool), forwards(hard, Strategy::rolling(n)));
        assert!(blocks < rolling, "n = {n}: {blocks} forwards, a rolling window takes {rolling}");
        // Where guesses hardly depend on one another, the guesses past the border of a block count.
        let (blocks, one) = (forwards(easy, Strategy::multi_block(n)), forwards(easy, Strategy::Jacobi { n }));
        assert!(blocks < one, "n = {n}: {blocks} forwards, one block at a time takes {one}");
    }
}

/// A row that decodes after the prompt 7 8 9 7.
fn lookahead_row<'l>(stop: &'l StopConditions, window: usize, candidates: usize) -> Row<'l> {
    let request = Request { sample_id: "a".into(), prompt_ids: vec![7, 8, 9, 7] };
    let strategy = Strategy::Lookahead { window, ngram: 3, candidates };
    Row::new(request, stop, DecodeOptions::greedy(strategy, 1))
}

/// What [`lookahead_row`]'s window of 3 columns, 2 levels and a candidate of 2 tokens is predicted where all goes well.
fn predictions(row: &Row<'_>) -> Vec<i32> {
    let tokens: Vec<i32> = row.window(0).tokens().collect();
    assert_eq!(
        (tokens.len(), tokens[0], &tokens[6..]),
        (8, 7, &[8, 9][..]),
        "what followed 7 in the prompt is guessed"
    );
    let mut predicted = vec![8, 101, 102, 103, 104, 105, 9, 7];
    // No token of the lookahead branch is right.
    if tokens[1] == 8 || tokens[3] == 8 {
        predicted[1] = -1;
        predicted[3] = -1;
    }
    predicted
}

#[test]
fn a_lookahead_window_is_a_tree_of_columns_and_candidates() {
    let stop = stop();
    let mut row = lookahead_row(&stop, 3, 1);
    let places = |row: &Row<'_>| -> Vec<(usize, usize)> {
        let window = row.window(0);
        (0..window.len()).map(|offset| (window.place(offset).parent, window.place(offset).depth)).collect()
    };
    assert_eq!(places(&row), [(0, 0), (0, 1), (1, 2), (0, 1), (1, 2), (2, 3), (0, 1), (6, 2)]);
    let old: Vec<i32> = row.window(0).tokens().collect();
    let predicted = predictions(&row);
    let Accepted { tokens, moves } = row.accept(&predicted, &predicted);
    assert_eq!(tokens, [8, 9, 7]);
    // The candidate's tokens lie behind the others: those at offsets 6 and 7 go to the slots behind that of the first token.
    assert_eq!(moves, [(3 + 6, 3 + 1), (3 + 7, 3 + 2)]);
    // Three tokens became known, so the columns that begin with the first two of them are over: the third one's goes on.
    let new: Vec<i32> = row.window(0).tokens().collect();
    assert_eq!((new[0], new[3]), (7, predicted[5]));
    assert!(new[1..3].iter().chain(&new[4..6]).all(|token| [7, 8, 9].contains(token)), "the others are drawn anew");
    // What its forward made of the columns are n-grams now; the newest follows the first token of the first column.
    assert_eq!(&new[6..], [old[3], predicted[3]]);
}

#[test]
fn an_answer_ends_at_an_eos_or_the_limit_inside_an_accepted_candidate() {
    for (stop, response, reason) in [
        (StopConditions { max_new_tokens: 40, eos_ids: vec![9] }, &[8, 9][..], FinishReason::Eos),
        (StopConditions { max_new_tokens: 2, eos_ids: vec![] }, &[8, 9], FinishReason::Length),
        (StopConditions { max_new_tokens: 1, eos_ids: vec![8] }, &[8], FinishReason::Eos),
    ] {
        let mut row = lookahead_row(&stop, 3, 1);
        let predicted = predictions(&row);
        assert_eq!(row.accept(&predicted, &predicted).tokens, response);
        let answer = row.into_answer();
        assert_eq!((&answer.response_ids[..], answer.finish_reason), (response, reason));
        assert_eq!(answer.num_accepted, [response.len() as u32]);
    }
}

#[test]
fn lookahead_takes_far_fewer_forwards_where_text_repeats() {
    let stop = StopConditions { max_new_tokens: 200, eos_ids: vec![] };
    let greedy =
        run(&mut Rule { next: repeating, ..Rule::new(7) }, 7, Strategy::Ar, &stop, Prefill::First, &mut |_, _| ());
    let of = |strategy| {
        let mut model = Rule { next: repeating, ..Rule::new(7) };
        let answers = run(&mut model, 7, strategy, &stop, Prefill::First, &mut |_, _| ());
        assert!(answers.iter().zip(&greedy).all(|(a, b)| a.response_ids == b.response_ids), "{strategy:?}");
        answers.iter().map(|answer| answer.num_forwards).sum::<usize>()
    };
    let (one_by_one, lookahead) = (of(Strategy::Ar), of(Strategy::lookahead()));
    assert_eq!(one_by_one, 7 * 200);
    // At best a candidate's three tokens and the prediction after them at a time.
    assert!(lookahead < one_by_one * 2 / 5, "{lookahead} forwards, {one_by_one} one by one");
}

#[test]
fn what_cannot_be_done_is_refused_with_its_numbers() {
    let lookahead = |window, ngram, candidates| Strategy::Lookahead { window, ngram, candidates };
    let multi = |n, blocks, ratio| Strategy::MultiBlock { n, blocks, ratio, pool: 0 };
    for (strategy, message) in [
        (Strategy::Jacobi { n: 1 }, "n of jacobi must be from 2 to 1024"),
        (Strategy::rolling(1025), "n of rolling must be from 2 to 1024"),
        (Strategy::Rolling { n: 4, pool: 1025 }, "pool of rolling must be at most 1024"),
        (multi(16, 1, 0.5), "blocks of multiblock must be at least 2"),
        (multi(16, 2, 0.0), "ratio of multiblock must be above 0 and at most 1"),
        (lookahead(0, 4, 5), "lookahead needs a window and candidates of at least 1"),
        (lookahead(5, 1, 5), "an ngram of at least 2"),
        (lookahead(15, 5, 15), "window 15, ngram 5 and candidates 15 of lookahead make a tree of"),
        (lookahead(usize::MAX, 5, 15), "there may be 64"),
        (multi(512, 3, 1.0), "3 blocks of 512 tokens make a window of 1536, there may be 1024"),
    ] {
        let error = strategy.check().unwrap_err().to_string();
        assert!(error.contains(message), "{error}");
    }
    assert!(strategies().into_iter().all(|strategy| strategy.check().is_ok()));
}

#[test]
fn the_answer_ends_at_the_first_eos_or_the_limit() {
    for answer in answers(Strategy::Jacobi { n: 8 }, &StopConditions { max_new_tokens: 5, eos_ids: vec![14, 5] }) {
        let ids = &answer.response_ids;
        let eos = ids.iter().position(|id| [14, 5].contains(id));
        match answer.finish_reason {
            FinishReason::Eos => assert_eq!(eos, Some(ids.len() - 1)),
            FinishReason::Length => assert!(eos.is_none() && ids.len() == 5),
        }
    }
}

#[test]
fn blocks_join_to_the_response_and_states_lead_to_the_fixed_point() {
    let n = 8;
    for answer in answers(Strategy::Jacobi { n }, &stop()) {
        let mut joined: Vec<i32> = Vec::new();
        for block in &answer.blocks {
            assert_eq!(block.start as usize, joined.len());
            assert!(block.states.iter().all(|state| state.len() == n));
            assert!(block.states.windows(2).all(|pair| pair[0] != pair[1]), "a repeated state was stored");
            joined.extend(block.states.last().unwrap());
            for pair in block.states.windows(2) {
                let right =
                    |state: &[i32]| state.iter().zip(block.states.last().unwrap()).take_while(|(a, b)| a == b).count();
                assert!(right(&pair[1]) > right(&pair[0]), "a forward fixes at least one token");
            }
        }
        joined.truncate(answer.response_ids.len());
        assert_eq!(joined, answer.response_ids);
    }
}

#[test]
fn guesses_come_from_the_tokens_seen_and_the_seed_alone() {
    let first = answers(Strategy::Jacobi { n: 8 }, &stop());
    let again = answers(Strategy::Jacobi { n: 8 }, &stop());
    for ((a, b), request) in first.iter().zip(&again).zip(requests()) {
        assert_eq!(a.blocks, b.blocks);
        let block = &a.blocks[0];
        let seen: Vec<i32> = request.prompt_ids.iter().copied().chain([block.states[0][0]]).collect();
        assert!(block.states[0][1..].iter().all(|token| seen.contains(token)));
    }
}

#[test]
fn the_watcher_sees_every_token_once_and_in_order() {
    let mut seen = vec![Vec::new(); requests().len()];
    let mut watch = |row: usize, new: &[i32]| seen[row].extend_from_slice(new);
    let answers = run(&mut Rule::new(7), 7, Strategy::Jacobi { n: 4 }, &stop(), Prefill::First, &mut watch);
    assert!(answers.iter().zip(&seen).all(|(answer, seen)| &answer.response_ids == seen));
}

#[test]
fn a_finished_row_leaves_its_place_to_the_next_request_without_a_change_of_answers() {
    let some = [Strategy::Ar, Strategy::Jacobi { n: 8 }, Strategy::Rolling { n: 5, pool: 2 }, Strategy::multi_block(4)];
    for strategy in some.into_iter().chain([Strategy::lookahead()]) {
        let together = answers(strategy, &stop());
        for (room, prompt_tokens) in [(1, usize::MAX), (2, 1), (3, 4), (5, usize::MAX)] {
            let mut model = Rule { prompt_tokens, ..Rule::new(room) };
            let streamed = run(&mut model, room, strategy, &stop(), Prefill::Beside, &mut |_, _| ());
            for (streamed, together) in streamed.iter().zip(&together) {
                assert_eq!(streamed.response_ids, together.response_ids, "{strategy:?} in {room} rows");
                assert_eq!(streamed.num_accepted, together.num_accepted);
                assert_eq!(streamed.blocks, together.blocks);
            }
        }
    }
}
