//! The decoding loop on a made-up model: exact, no weights.

use super::*;

/// Predicts from the whole sequence so far by a fixed rule; checks that windows follow what is cached.
struct Rule {
    sequences: Vec<Vec<i32>>,
    vocab: i32,
}

impl Rule {
    fn new(requests: &[Request], vocab: i32) -> Self {
        let sequences = requests.iter().map(|r| r.prompt_ids[..r.prompt_ids.len() - 1].to_vec()).collect();
        Rule { sequences, vocab }
    }

    /// Mostly depends on the last token, at times on the sum of all: converges in fewer than n steps, but not in one.
    fn next(&self, sequence: &[i32]) -> i32 {
        let last = sequence[sequence.len() - 1];
        if last % 3 == 0 { (sequence.iter().sum::<i32>() * 7 + 5) % self.vocab } else { (last * 5 + 1) % self.vocab }
    }
}

impl Greedy for Rule {
    fn predict(&mut self, windows: &[Window<'_>]) -> Result<Vec<Vec<i32>>> {
        assert_eq!(windows.len(), self.sequences.len());
        let mut all = Vec::new();
        for (window, cached) in windows.iter().zip(&self.sequences) {
            assert!(window.start <= cached.len(), "the window leaves a hole in the cache");
            let mut sequence = cached[..window.start].to_vec();
            let mut predicted = Vec::new();
            for token in std::iter::once(window.known).chain(window.guesses.iter().copied()) {
                sequence.push(token);
                predicted.push(self.next(&sequence));
            }
            all.push((sequence, predicted));
        }
        let (sequences, predictions) = all.into_iter().unzip();
        self.sequences = sequences;
        Ok(predictions)
    }

    fn keep(&mut self, rows: &[usize]) {
        self.sequences = rows.iter().map(|&row| self.sequences[row].clone()).collect();
    }
}

fn requests() -> Vec<Request> {
    (1..=7)
        .map(|index| Request {
            sample_id: format!("s{index}"),
            prompt_ids: (0..index).map(|i| i * 3 + index).collect(),
        })
        .collect()
}

fn answers(strategy: Strategy, limits: &Limits) -> Vec<Answer> {
    let requests = requests();
    let options = DecodeOptions { strategy, seed: 1, record: true };
    converge(&mut Rule::new(&requests, 29), &requests, limits, options, None).unwrap()
}

fn limits() -> Limits {
    Limits { max_new_tokens: 40, eos_ids: vec![14, 5] }
}

#[test]
fn the_fixed_point_is_the_greedy_answer_for_every_n() {
    let greedy = answers(Strategy::Ar, &limits());
    assert!(greedy.iter().any(|a| a.finish_reason == FinishReason::Eos));
    assert!(greedy.iter().all(|a| a.forwards == a.response_ids.len()));
    let strategies = [2, 3, 8, 16, 64].into_iter().flat_map(|n| [Strategy::Jacobi { n }, Strategy::Rolling { n }]);
    for strategy in strategies {
        for (several, greedy) in answers(strategy, &limits()).iter().zip(&greedy) {
            assert_eq!(several.response_ids, greedy.response_ids, "{strategy:?}");
            assert_eq!(several.finish_reason, greedy.finish_reason);
            assert!(several.forwards <= greedy.forwards);
            assert_eq!(several.accepted.iter().sum::<u32>() as usize, several.response_ids.len());
        }
    }
}

#[test]
fn a_rolling_window_keeps_its_predictions_and_never_shrinks() {
    let request = Request { sample_id: "a".into(), prompt_ids: vec![1, 2, 3] };
    let limits = limits();
    let options = DecodeOptions { strategy: Strategy::Rolling { n: 4 }, seed: 1, record: false };
    let mut row = Row::new(&request, &limits, options);
    assert_eq!((row.window().start, row.window().known, row.window().guesses.len()), (2, 3, 3));
    let first = row.window().guesses[0];
    // The first guess is right, the second is not: two tokens are final, and the predictions after them stay.
    let wrong = row.window().guesses[1] + 1;
    assert_eq!(row.accept(&[first, wrong, 21, 22]), [first, wrong]);
    assert_eq!((row.window().known, &row.window().guesses[..2]), (wrong, &[21, 22][..]));
    assert!(row.window().guesses.len() == 3 && [1, 2, 3, first, wrong].contains(&row.window().guesses[2]));
}

#[test]
fn the_answer_ends_at_the_first_eos_or_the_limit() {
    for answer in answers(Strategy::Jacobi { n: 8 }, &Limits { max_new_tokens: 5, eos_ids: vec![14, 5] }) {
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
    for answer in answers(Strategy::Jacobi { n }, &limits()) {
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
    let first = answers(Strategy::Jacobi { n: 8 }, &limits());
    let again = answers(Strategy::Jacobi { n: 8 }, &limits());
    for ((a, b), request) in first.iter().zip(&again).zip(requests()) {
        assert_eq!(a.blocks, b.blocks);
        let block = &a.blocks[0];
        let seen: Vec<i32> = request.prompt_ids.iter().copied().chain([block.states[0][0]]).collect();
        assert!(block.states[0][1..].iter().all(|token| seen.contains(token)));
    }
}

#[test]
fn the_watcher_sees_every_token_once_and_in_order() {
    let requests = requests();
    let mut seen = vec![Vec::new(); requests.len()];
    let options = DecodeOptions { strategy: Strategy::Jacobi { n: 4 }, seed: 1, record: false };
    let mut watch = |row: usize, new: &[i32]| seen[row].extend_from_slice(new);
    let answers = converge(&mut Rule::new(&requests, 29), &requests, &limits(), options, Some(&mut watch)).unwrap();
    assert!(answers.iter().zip(&seen).all(|(answer, seen)| &answer.response_ids == seen && answer.blocks.is_empty()));
}
