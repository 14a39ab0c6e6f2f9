//! Divides the batches of a step among the processes, so that all take about as long.

use cllm_core::distributed::ProcessGroup;

/// Which process this is, of how many.
#[derive(Clone, Copy)]
pub struct RankShard {
    pub rank: usize,
    pub world_size: usize,
}

impl RankShard {
    /// The only process.
    pub fn all() -> Self {
        RankShard { rank: 0, world_size: 1 }
    }

    pub fn for_process(group: &ProcessGroup) -> Self {
        RankShard { rank: group.rank(), world_size: group.world_size() }
    }
}

/// What an example takes.
#[derive(Clone, Copy)]
pub struct ExampleSize {
    /// Tokens of its packed sequence.
    pub num_tokens: usize,
    /// What its forward and backward take, in any unit.
    pub cost: f64,
}

/// The batches of one process, and what they cost.
#[derive(Clone, Default)]
struct Share {
    batches: Vec<Vec<usize>>,
    cost: f64,
}

/// The batches of every process, by rank, as indices of examples. Every process gets as many whole
/// batches as every other. The examples of those that remain are spread over all processes, in
/// batches that are smaller. A single process gets the batches as they are.
pub fn divide(
    batches: &[Vec<usize>],
    world_size: usize,
    max_batch_tokens: usize,
    size_of: impl Fn(usize) -> ExampleSize,
) -> Vec<Vec<Vec<usize>>> {
    if world_size == 1 {
        return vec![batches.to_vec()];
    }
    let cost_of = |batch: &Vec<usize>| batch.iter().map(|&example| size_of(example).cost).sum::<f64>();
    let mut by_cost: Vec<(&Vec<usize>, f64)> = batches.iter().map(|batch| (batch, cost_of(batch))).collect();
    by_cost.sort_by(|(_, a), (_, b)| b.total_cmp(a));
    let (whole, rest) = by_cost.split_at(by_cost.len() / world_size * world_size);
    let mut shares = vec![Share::default(); world_size];
    whole.chunks(world_size).for_each(|round| give_one_to_each(&mut shares, round));
    match spread(rest, &shares, max_batch_tokens, &size_of) {
        Some(parts) => {
            for (share, part) in shares.iter_mut().zip(parts).filter(|(_, part)| !part.is_empty()) {
                share.batches.push(part);
            }
        }
        None => give_one_to_each(&mut shares, rest),
    }
    shares.into_iter().map(|share| share.batches).collect()
}

/// The largest batch of a round goes to the process that has the least to do, and so on.
fn give_one_to_each(shares: &mut [Share], batches: &[(&Vec<usize>, f64)]) {
    let mut ranks: Vec<usize> = (0..shares.len()).collect();
    ranks.sort_by(|&a, &b| shares[a].cost.total_cmp(&shares[b].cost));
    for (rank, &(batch, cost)) in ranks.into_iter().zip(batches) {
        shares[rank].cost += cost;
        shares[rank].batches.push(batch.clone());
    }
}

/// Spreads the examples of some batches over the processes: the largest goes to the one that has the
/// least to do, and so on. `None` if that would make a batch too large.
fn spread(
    batches: &[(&Vec<usize>, f64)],
    shares: &[Share],
    max_batch_tokens: usize,
    size_of: &impl Fn(usize) -> ExampleSize,
) -> Option<Vec<Vec<usize>>> {
    let mut examples: Vec<usize> = batches.iter().flat_map(|(batch, _)| batch.iter().copied()).collect();
    examples.sort_by(|&a, &b| size_of(b).cost.total_cmp(&size_of(a).cost));
    let mut parts = vec![Vec::new(); shares.len()];
    let mut cost: Vec<f64> = shares.iter().map(|share| share.cost).collect();
    let mut space = vec![max_batch_tokens; shares.len()];
    for example in examples {
        let ExampleSize { num_tokens, cost: cost_of_example } = size_of(example);
        let has_space = |&rank: &usize| space[rank] >= num_tokens;
        let rank = (0..shares.len()).filter(has_space).min_by(|&a, &b| cost[a].total_cmp(&cost[b]))?;
        parts[rank].push(example);
        cost[rank] += cost_of_example;
        space[rank] -= num_tokens;
    }
    Some(parts)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Example i has `SIZES[i]` tokens, and costs as much.
    const SIZES: [usize; 12] = [9, 1, 8, 2, 4, 4, 4, 1, 1, 1, 1, 1];

    fn size_of(example: usize) -> ExampleSize {
        ExampleSize { num_tokens: SIZES[example], cost: SIZES[example] as f64 }
    }

    fn work(shares: &[Vec<Vec<usize>>]) -> Vec<usize> {
        let sum = |share: &Vec<Vec<usize>>| share.iter().flatten().map(|&example| SIZES[example]).sum();
        shares.iter().map(sum).collect()
    }

    #[test]
    fn every_process_gets_its_part_of_every_batch_that_remains() {
        let batches = [vec![0, 1], vec![2, 3], vec![4, 5], vec![6, 7], vec![8, 9, 10, 11]];
        for world_size in 1..=5 {
            let shares = divide(&batches, world_size, 10, size_of);
            let mut examples: Vec<usize> = shares.iter().flatten().flatten().copied().collect();
            examples.sort_unstable();
            assert_eq!(examples, (0..12).collect::<Vec<_>>(), "{world_size}");
            assert!(shares.iter().flatten().all(|batch| work(&[vec![batch.clone()]])[0] <= 10), "{world_size}");
        }
        assert_eq!(divide(&batches, 1, 10, size_of), [batches.to_vec()]);
        assert_eq!(work(&divide(&batches, 2, 10, size_of)), [19, 18]);
        // The two batches that remain are spread over three processes.
        assert_eq!(work(&divide(&batches, 3, 10, size_of)), [13, 12, 12]);
    }

    #[test]
    fn batches_stay_whole_where_their_examples_cannot_be_spread() {
        // The three small ones, which take the longest, would leave no space for the large one.
        let size_of =
            |example: usize| ExampleSize { num_tokens: [3, 3, 3, 8][example], cost: [2.0, 2.0, 2.0, 1.0][example] };
        let batches = [vec![0, 1, 2], vec![3]];
        assert_eq!(divide(&batches, 3, 10, size_of), [vec![batches[0].clone()], vec![batches[1].clone()], vec![]]);
    }
}
