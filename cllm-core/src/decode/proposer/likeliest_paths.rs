//! The likeliest paths: a rolling window as wide as is worth its time, or one that branches.

use std::collections::BinaryHeap;

use super::random_draft::RandomDraft;
use super::{Proposer, Verification};
use crate::decode::sampling::{Candidate, Candidates, NO_CANDIDATES};
use crate::decode::tree::TokenTree;
use crate::decode::width::Width;
use crate::decode::window_chooser::{Outcome, Prospects};

/// Drafts a tree: paths of candidates for the positions after the last token, where the first
/// candidates of all positions are the spine. As in a rolling window, the predictions along the
/// accepted path and then along the spine are the candidates of the next draft, the predictions
/// after positions that were not forwarded stay, and random tokens follow.
///
/// A path's probability is the product of those of its tokens, as if these did not depend on each
/// other. A fixed width drafts the whole spine, and then the likeliest paths beside it. Otherwise
/// the scheduler chooses how many of the draft tokens are forwarded ([`LikeliestPaths::gains`]).
pub(in crate::decode) struct LikeliestPaths {
    width: Width,
    /// Maximum number of draft tokens.
    max_drafts: usize,
    /// Number of candidates of each position that are drafted.
    num_ranks: usize,
    random: RandomDraft,
    /// The candidates for the positions after the last token.
    positions: Vec<Position>,
    /// All draft tokens that may be forwarded, the most useful first; each comes after its parent.
    planned: Vec<PlannedToken>,
    /// What is forwarded, in the order of the window.
    window: Vec<PlannedToken>,
    draft: Vec<i32>,
    /// `None` if the window does not branch.
    tree: Option<TokenTree>,
    outcomes: Vec<Outcome>,
}

/// The candidates for a position.
#[derive(Debug, Clone, Copy)]
struct Position {
    candidates: Candidates,
    /// The last forward predicted them.
    is_fresh: bool,
}

/// A draft token.
#[derive(Debug, Clone, Copy)]
struct PlannedToken {
    /// Number in its list of the draft token that this one follows; `None` for the last token of the
    /// sequence.
    parent: Option<usize>,
    /// Positions after the last token, from 1.
    depth: usize,
    /// Rank among the candidates of its position.
    rank: usize,
    /// Whether it and all before it are the first candidates.
    is_on_spine: bool,
    /// Probability that it is accepted.
    probability: f64,
    /// What it is expected to add to the new tokens.
    gain: f64,
}

impl PlannedToken {
    /// Offset of the parent in the window that the tokens of its list make up.
    fn parent_offset(&self) -> usize {
        self.parent.map_or(0, |parent| parent + 1)
    }
}

/// Probability of a token whose own is smaller, for the order of paths.
const MIN_PROBABILITY: f64 = 0.01;

impl LikeliestPaths {
    /// With up to `max_tokens` in the window, which may branch or not.
    pub(in crate::decode) fn new(
        width: Width,
        max_tokens: usize,
        may_branch: bool,
        prompt: &[i32],
        random: RandomDraft,
    ) -> Self {
        let mut paths = LikeliestPaths {
            width,
            max_drafts: max_tokens - 1,
            num_ranks: if may_branch { NO_CANDIDATES.len() } else { 1 },
            random,
            positions: Vec::new(),
            planned: Vec::new(),
            window: Vec::new(),
            draft: Vec::new(),
            tree: None,
            outcomes: Vec::new(),
        };
        paths.restart(prompt);
        paths
    }

    /// Plans the draft tokens of the next forward, and returns what each is expected to add to the
    /// new tokens, in the order in which they would be forwarded.
    ///
    /// A token on the spine serves twice: it may be accepted now, and the prediction after it may be
    /// in the next forward. Since an accepted token takes both of these forwards, each of them
    /// counts half. Predictions beside the spine come with those on it, so they count in full.
    ///
    /// `tokens` are those of the sequence.
    pub(in crate::decode) fn gains(&mut self, prospects: &Prospects<'_>, tokens: &[i32]) -> Vec<f64> {
        let survival = &prospects.survival;
        // Random tokens follow, as far as the predictions after them may be of use. They are drawn for
        // many forwards at once, since seeding their generator takes time.
        let num_predicted = self.positions.iter().rposition(Position::is_predicted).map_or(0, |index| index + 1);
        let num_positions = (num_predicted + survival.len()).min(self.max_drafts);
        if self.positions.len() < num_positions {
            self.complete(tokens, self.max_drafts);
        }
        let rate = |candidate: Candidate| prospects.history.rate(candidate.probability.into());
        // The probabilities that at least 0, 1, 2, ... tokens of the spine are accepted.
        let mut accepted = vec![1.0];
        for (index, position) in self.positions[..num_positions].iter().enumerate() {
            accepted.push(accepted[index] * rate(position.candidates[0]));
        }
        let spine_gain = |depth: usize| {
            let after = |num_accepted: usize| {
                let probability = accepted[num_accepted] - accepted[num_accepted + 1];
                probability * survival[depth - num_accepted - 1]
            };
            let first = depth.saturating_sub(survival.len());
            (accepted[depth] + (first..depth).map(after).sum::<f64>()) / 2.0
        };
        self.plan(num_positions, rate, spine_gain, prospects.min_gain);
        self.planned.iter().map(|token| token.gain).collect()
    }

    /// Sets the number of planned draft tokens that the next forward has.
    pub(in crate::decode) fn set_num_drafts(&mut self, num_drafts: usize) {
        // The spine comes first, so that its tokens need not move in the cache when they are
        // accepted.
        let mut order: Vec<usize> = (0..num_drafts.min(self.planned.len())).collect();
        order.sort_by_key(|&index| !self.planned[index].is_on_spine);
        let mut new_index = vec![0; order.len()];
        order.iter().enumerate().for_each(|(new, &old)| new_index[old] = new);
        let moved = |&old: &usize| {
            let token = self.planned[old];
            PlannedToken { parent: token.parent.map(|parent| new_index[parent]), ..token }
        };
        self.window = order.iter().map(moved).collect();
        self.draft = self.window.iter().map(|token| self.candidate(token).token).collect();
        let parents = self.window.iter().map(PlannedToken::parent_offset);
        let is_branching = self.window.iter().any(|token| !token.is_on_spine);
        self.tree = is_branching.then(|| TokenTree::new(parents));
    }

    /// What became of the draft tokens of the last forward.
    pub(in crate::decode) fn take_outcomes(&mut self) -> Vec<Outcome> {
        std::mem::take(&mut self.outcomes)
    }

    fn candidate(&self, token: &PlannedToken) -> Candidate {
        self.positions[token.depth - 1].candidates[token.rank]
    }

    /// Lists up to `max_drafts` draft tokens that gain at least `min_gain`, for the first `num_positions`
    /// positions. Of those whose parents are listed, the next is always one with the largest gain:
    /// `spine_gain` of its depth on the spine, and its probability beside it. `rate` is the probability
    /// that a candidate is accepted after its parent.
    fn plan(
        &mut self,
        num_positions: usize,
        rate: impl Fn(Candidate) -> f64,
        spine_gain: impl Fn(usize) -> f64,
        min_gain: f64,
    ) {
        let positions = &self.positions[..num_positions];
        let mut planned: Vec<PlannedToken> = Vec::new();
        let mut next = BinaryHeap::new();
        let add = |next: &mut BinaryHeap<ByGain>, planned: &[PlannedToken], parent: Option<usize>, rank: usize| {
            let parent_token = parent.map(|index| planned[index]);
            let depth = parent_token.map_or(1, |token| token.depth + 1);
            let Some(position) = positions.get(depth - 1) else { return };
            if rank == self.num_ranks || position.candidates[rank].token < 0 {
                return;
            }
            let is_on_spine = rank == 0 && parent_token.is_none_or(|token| token.is_on_spine);
            let probability = parent_token.map_or(1.0, |token| token.probability) * rate(position.candidates[rank]);
            let gain = if is_on_spine { spine_gain(depth) } else { probability };
            next.push(ByGain(PlannedToken { parent, depth, rank, is_on_spine, probability, gain }));
        };
        add(&mut next, &planned, None, 0);
        while let Some(ByGain(token)) = next.pop() {
            if planned.len() == self.max_drafts || token.gain < min_gain {
                break;
            }
            planned.push(token);
            add(&mut next, &planned, Some(planned.len() - 1), 0);
            add(&mut next, &planned, token.parent, token.rank + 1);
        }
        self.planned = planned;
    }

    /// Adds random tokens after the positions for which there is something better, up to a number of
    /// positions.
    fn complete(&mut self, tokens: &[i32], num_positions: usize) {
        let mut random_tokens = Vec::new();
        self.random.fill(&mut random_tokens, num_positions.saturating_sub(self.positions.len()), tokens);
        self.positions.extend(random_tokens.into_iter().map(Position::random));
    }

    /// Drafts the tokens of a fixed width. Otherwise there are none until their number is chosen.
    fn draft_fixed_width(&mut self, tokens: &[i32]) {
        self.planned.clear();
        if let Width::Fixed(n) = self.width {
            self.complete(tokens, n - 1);
            // The whole spine comes first.
            let rate = |candidate: Candidate| f64::from(candidate.probability).max(MIN_PROBABILITY);
            self.plan(n - 1, rate, |_| f64::INFINITY, 0.0);
        }
        self.set_num_drafts(self.planned.len());
    }

    /// Notes what became of the draft tokens whose parents were accepted.
    fn note_outcomes(&mut self, path: &[usize]) {
        let num_fresh = self.positions.iter().take_while(|position| position.is_fresh).count();
        let verified = self.window.iter().enumerate().filter(|(_, token)| path.contains(&token.parent_offset()));
        let outcome = |(index, token): (usize, &PlannedToken)| Outcome {
            confidence: self.candidate(token).probability.into(),
            depth: (token.is_on_spine && token.depth <= num_fresh).then_some(token.depth),
            is_accepted: path.contains(&(index + 1)),
        };
        self.outcomes = verified.map(outcome).collect();
    }

    /// The offsets in the window after which the positions that follow the newest token were
    /// predicted: its rejected continuation, and then the spine.
    fn offsets_after(&self, path: &[usize]) -> Vec<usize> {
        let first_child = |offset: usize| {
            let is_child = |token: &PlannedToken| token.parent_offset() == offset;
            self.window.iter().position(is_child).map(|index| index + 1)
        };
        let on_spine = |depth: usize| self.window.get(depth - 1).filter(|token| token.is_on_spine).map(|_| depth);
        let mut branch = path.last().copied();
        let next = |depth| {
            branch = branch.and_then(first_child);
            branch.or(on_spine(depth))
        };
        (path.len()..).map_while(next).collect()
    }
}

impl Position {
    fn is_predicted(&self) -> bool {
        self.candidates[0].probability > 0.0
    }

    fn random(token: i32) -> Self {
        let mut candidates = NO_CANDIDATES;
        candidates[0].token = token;
        Position { candidates, is_fresh: false }
    }
}

impl Proposer for LikeliestPaths {
    fn draft(&self) -> &[i32] {
        &self.draft
    }

    fn tree(&self) -> Option<&TokenTree> {
        self.tree.as_ref()
    }

    fn update(&mut self, verification: &Verification<'_>) {
        self.note_outcomes(verification.path);
        let offsets = self.offsets_after(verification.path);
        // The newest token takes the position after the accepted ones.
        self.positions.drain(..verification.path.len().min(self.positions.len()));
        self.positions.iter_mut().for_each(|position| position.is_fresh = false);
        let fresh =
            offsets.iter().map(|&offset| Position { candidates: verification.candidates[offset], is_fresh: true });
        let num_replaced = offsets.len().min(self.positions.len());
        self.positions.splice(..num_replaced, fresh);
        self.draft_fixed_width(verification.tokens);
    }

    fn restart(&mut self, tokens: &[i32]) {
        self.positions.clear();
        self.draft_fixed_width(tokens);
    }

    fn likeliest_paths(&mut self) -> Option<&mut LikeliestPaths> {
        Some(self)
    }
}

/// Draft tokens by their gains. Among equal ones, the one of the lower rank comes first, and then
/// the one that is closer to the last token.
struct ByGain(PlannedToken);

impl Ord for ByGain {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        let by_rank = other.0.rank.cmp(&self.0.rank).then(other.0.depth.cmp(&self.0.depth));
        self.0.gain.total_cmp(&other.0.gain).then(by_rank)
    }
}

impl PartialOrd for ByGain {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for ByGain {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for ByGain {}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decode::tree::Node;
    use crate::decode::window_chooser::AcceptanceHistory;

    const MIN_GAIN: f64 = 1e-3;

    fn prospects(history: &AcceptanceHistory) -> Prospects<'_> {
        Prospects::new(history, MIN_GAIN)
    }

    fn candidates(of: &[(i32, f32)]) -> Candidates {
        let mut candidates = NO_CANDIDATES;
        for (candidate, &(token, probability)) in candidates.iter_mut().zip(of) {
            *candidate = Candidate { token, probability };
        }
        candidates
    }

    /// After the prompt 1 2 3 and a forward that accepted nothing and predicted 7, and then these
    /// candidates after each draft token.
    fn after_forward(width: Width, tree: usize, predicted: &[Candidates]) -> LikeliestPaths {
        let max_tokens = if tree == 0 { 64 } else { tree };
        let mut paths = LikeliestPaths::new(width, max_tokens, tree > 0, &[1, 2, 3], RandomDraft::new(1, "a"));
        if width == Width::Auto {
            paths.gains(&prospects(&AcceptanceHistory::default()), &[1, 2, 3, 7]);
            paths.set_num_drafts(predicted.len());
        }
        let all = [&[candidates(&[(7, 1.0)])], predicted].concat();
        let tokens: Vec<i32> = all.iter().map(|candidates| candidates[0].token).collect();
        paths.update(&Verification {
            predicted: &tokens,
            proposed: &tokens,
            candidates: &all,
            path: &[0],
            tokens: &[1, 2, 3, 7],
            is_truncated: false,
        });
        paths
    }

    fn nodes(paths: &LikeliestPaths) -> Vec<(i32, usize)> {
        let parent = |offset| paths.tree().map_or(offset - 1, |tree| tree.node(offset).parent);
        paths.draft().iter().enumerate().map(|(index, &token)| (token, parent(index + 1))).collect()
    }

    #[test]
    fn a_fixed_width_drafts_its_spine_and_the_likeliest_paths_beside_it() {
        let first = candidates(&[(10, 0.5), (11, 0.4), (12, 0.05)]);
        let second = candidates(&[(20, 0.6), (21, 0.3)]);
        let unlikely = candidates(&[(30, 0.01), (31, 0.001)]);
        let paths = after_forward(Width::Fixed(4), 8, &[first, second, unlikely]);
        // Of the paths beside the spine 10 20 30, the likeliest are 11 (0.4), 11 20 (0.24), 10 21
        // (0.15) and 11 21 (0.12).
        let spine = [(10, 0), (20, 1), (30, 2)];
        assert_eq!(nodes(&paths), [&spine[..], &[(11, 0), (20, 4), (21, 1), (21, 4)]].concat());
        assert_eq!(paths.tree().unwrap().node(5), Node { parent: 4, depth: 2, visible: 0b110001 });
        // A window of one more token than its spine has room for one branch.
        let paths = after_forward(Width::Fixed(4), 5, &[first, second, unlikely]);
        assert_eq!(nodes(&paths), [&spine[..], &[(11, 0)]].concat());
    }

    #[test]
    fn the_next_candidates_were_predicted_along_the_rejected_branch_and_then_the_spine() {
        let first = candidates(&[(10, 0.5), (11, 0.4), (12, 0.05)]);
        let second = candidates(&[(20, 0.6), (21, 0.3)]);
        let unlikely = candidates(&[(30, 0.01)]);
        let mut paths = after_forward(Width::Fixed(4), 8, &[first, second, unlikely]);
        // The path 11 is accepted and its continuations 20 and 21 are not: 22 follows it. What comes
        // after that was predicted after 20 beside the spine, and then after 30 on it.
        let predicted: [i32; 8] = [11, 0, 0, 33, 22, 45, 0, 47];
        let candidates: Vec<Candidates> = predicted.iter().map(|&token| candidates(&[(token, 0.5)])).collect();
        paths.update(&Verification {
            predicted: &predicted,
            proposed: &predicted,
            candidates: &candidates,
            path: &[0, 4],
            tokens: &[1, 2, 3, 7, 11, 22],
            is_truncated: false,
        });
        assert_eq!(paths.draft()[..2], [45, 33]);
        let outcomes: Vec<(bool, Option<usize>)> =
            paths.take_outcomes().iter().map(|outcome| (outcome.is_accepted, outcome.depth)).collect();
        // 10 and 11 after the last token, and 20 and 21 after 11. Only 10 is on the spine.
        assert_eq!(outcomes, [(false, Some(1)), (true, None), (false, None), (false, None)]);
        assert!(paths.take_outcomes().is_empty());
    }

    #[test]
    fn a_chosen_width_takes_the_most_useful_tokens_first() {
        let sure = candidates(&[(10, 0.99), (11, 0.005)]);
        let open = candidates(&[(20, 0.5), (21, 0.48)]);
        let mut paths = after_forward(Width::Auto, 64, &[sure, open, sure]);
        assert!(paths.draft().is_empty(), "nothing is drafted until a number is chosen");
        let gains = paths.gains(&prospects(&AcceptanceHistory::default()), &[1, 2, 3, 7]);
        assert!(gains.len() > 3 && gains.iter().all(|&gain| gain >= MIN_GAIN), "{gains:?}");
        paths.set_num_drafts(3);
        assert_eq!(nodes(&paths), [(10, 0), (20, 1), (21, 1)], "a token beside the spine before an unlikely one on it");
        paths.set_num_drafts(0);
        assert!(paths.draft().is_empty() && paths.tree().is_none());
        // Without branches, the tokens are in order, with random ones of the text after them.
        let mut chain = after_forward(Width::Auto, 0, &[sure, open, sure]);
        chain.gains(&prospects(&AcceptanceHistory::default()), &[1, 2, 3, 7]);
        chain.set_num_drafts(5);
        assert_eq!(chain.draft()[..3], [10, 20, 10]);
        assert!(chain.tree().is_none() && chain.draft()[3..].iter().all(|token| [1, 2, 3, 7].contains(token)));
    }

    #[test]
    fn predictions_that_were_not_forwarded_again_stay_at_their_positions() {
        let at = |token| candidates(&[(token, 0.9)]);
        let mut paths = after_forward(Width::Auto, 0, &[at(10), at(20), at(30), at(40)]);
        paths.gains(&prospects(&AcceptanceHistory::default()), &[1, 2, 3, 7]);
        paths.set_num_drafts(1);
        // 10 is accepted and 21 follows it; only what comes after 21 is known from before.
        paths.update(&Verification {
            predicted: &[10, 21],
            proposed: &[10, 21],
            candidates: &[at(10), at(21)],
            path: &[0, 1],
            tokens: &[1, 2, 3, 7, 10, 21],
            is_truncated: false,
        });
        paths.gains(&prospects(&AcceptanceHistory::default()), &[1, 2, 3, 7]);
        paths.set_num_drafts(2);
        assert_eq!(paths.draft(), [30, 40]);
    }
}
