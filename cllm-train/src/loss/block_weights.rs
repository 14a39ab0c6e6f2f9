//! Weights of the positions of noisy blocks in the global loss. They depend on what the student
//! predicts, but count as constants.

use cllm_core::Result;
use cllm_core::device::upload;
use tch::{Device, Kind, Tensor};

use crate::data::batch::Chunk;
use crate::settings::{ConsistencySettings, PositionWeights};

/// By how much the student's confidence in a token is drawn towards 1, so that the positions behind
/// an unlikely token still count (D-PACE, arXiv 2605.18810).
const SMOOTHING: f64 = 0.5;

/// Computes the weights of the noisy rows of a chunk.
pub struct BlockWeights {
    after_miss_weight: f64,
    position_weights: PositionWeights,
    /// The token that each noisy row should predict, int64 `[rows]`.
    labels: Tensor,
    /// The noisy row at each position of each block, int64 `[blocks, positions]`. Shorter blocks end
    /// with the number of rows.
    rows: Tensor,
    /// The flat index of each noisy row in `rows`, int64 `[rows]`.
    cells: Tensor,
}

impl BlockWeights {
    /// `None` if all weights are 1.
    ///
    /// # Errors
    /// [`cllm_core::Error::Torch`].
    pub fn new(settings: &ConsistencySettings, chunk: &Chunk, device: Device) -> Result<Option<Self>> {
        let ConsistencySettings { after_miss_weight, position_weights, .. } = *settings;
        let (num_blocks, num_rows) = (chunk.noisy_blocks.len(), chunk.noisy_rows.len());
        let are_uniform = after_miss_weight == 1.0 && position_weights == PositionWeights::Uniform;
        if are_uniform || num_rows == 0 {
            return Ok(None);
        }
        let width = chunk.noisy_blocks.iter().map(Vec::len).max().unwrap_or(0);
        let mut rows = vec![num_rows as i64; num_blocks * width];
        let mut cells = vec![0; num_rows];
        for (block, block_rows) in chunk.noisy_blocks.iter().enumerate() {
            for (position, &row) in block_rows.iter().enumerate() {
                rows[block * width + position] = row as i64;
                cells[row] = (block * width + position) as i64;
            }
        }
        Ok(Some(BlockWeights {
            after_miss_weight,
            position_weights,
            labels: upload(&chunk.noisy_labels, device)?,
            rows: upload(&rows, device)?.view([num_blocks as i64, width as i64]),
            cells: upload(&cells, device)?,
        }))
    }

    /// The weight of each noisy row, float32 `[rows]`, by its logits `[rows, vocab]` and their
    /// logsumexp `[rows]`.
    pub fn of_rows(&self, logits: &Tensor, logsumexps: &Tensor) -> Tensor {
        let label_logits = logits.gather(1, &self.labels.unsqueeze(-1), false).squeeze_dim(-1);
        let mut weights = self.rows.ones_like().to_kind(Kind::Float);
        if self.after_miss_weight != 1.0 {
            let is_hit = label_logits.ge_tensor(&logits.amax([-1i64].as_slice(), false)).to_kind(Kind::Float);
            let all_before_hit = before(&self.by_block(&is_hit).cumprod(-1, Kind::Float));
            weights *= &all_before_hit + (1.0 - &all_before_hit) * self.after_miss_weight;
        }
        if self.position_weights == PositionWeights::Acceptance {
            let confidence = (label_logits.to_kind(Kind::Float) - logsumexps).exp();
            weights *= self.acceptance_weights(&self.by_block(&confidence));
        }
        weights.flatten(0, -1).index_select(0, &self.cells)
    }

    /// The derivative of the expected number of accepted tokens by the logarithm of each token's
    /// confidence: the sum, over the token and those after it, of the probability that all tokens up
    /// to there are accepted. It is divided by what its mean over the block would be if all were
    /// certain.
    fn acceptance_weights(&self, confidence: &Tensor) -> Tensor {
        let num_rows = self.cells.size()[0];
        let is_token = self.rows.lt(num_rows).to_kind(Kind::Float);
        let accepted = (confidence * (1.0 - SMOOTHING) + SMOOTHING).cumprod(-1, Kind::Float) * &is_token;
        let from_here_on = accepted.flip([-1i64]).cumsum(-1, Kind::Float).flip([-1i64]);
        let lengths = is_token.sum_dim_intlist([-1i64].as_slice(), true, Kind::Float);
        from_here_on * 2.0 / (lengths + 1.0)
    }

    /// Values of the noisy rows as `[blocks, positions]`; 1 after the end of shorter blocks.
    fn by_block(&self, values: &Tensor) -> Tensor {
        let padded = Tensor::cat(&[values, &values.new_ones([1], (values.kind(), values.device()))], 0);
        padded.index_select(0, &self.rows.flatten(0, -1)).view_as(&self.rows)
    }
}

/// For each position, the value of the one before it; 1 for the first.
fn before(values: &Tensor) -> Tensor {
    let first = values.narrow(-1, 0, 1).ones_like();
    Tensor::cat(&[first, values.narrow(-1, 0, values.size()[1] - 1)], -1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings::Settings;

    /// Rows 0, 2 and 3 are a block, and row 1 is another. Each should predict token 1 of three. The
    /// student is certain in rows 0 and 3, and prefers another token in rows 1 and 2.
    fn weights(after_miss_weight: f64, position_weights: PositionWeights) -> Vec<f32> {
        let settings = ConsistencySettings { after_miss_weight, position_weights, ..Settings::plain().consistency };
        let chunk = Chunk {
            noisy_rows: vec![7, 8, 9, 10],
            noisy_labels: vec![1; 4],
            noisy_blocks: vec![vec![0, 2, 3], vec![1]],
            ..Chunk::default()
        };
        let logits = Tensor::from_slice2(&[[0f32, 40.0, 0.0], [40.0, 0.0, 0.0], [0.0, 0.0, 40.0], [0.0, 40.0, 0.0]]);
        let weights = BlockWeights::new(&settings, &chunk, Device::Cpu).unwrap().unwrap();
        Vec::try_from(weights.of_rows(&logits, &logits.logsumexp([-1], false))).unwrap()
    }

    #[test]
    fn positions_behind_the_first_miss_of_their_block_count_less() {
        assert_eq!(weights(0.25, PositionWeights::Uniform), [1.0, 1.0, 1.0, 0.25]);
        assert_eq!(weights(0.0, PositionWeights::Uniform), [1.0, 1.0, 1.0, 0.0]);
    }

    #[test]
    fn positions_count_by_the_tokens_that_they_let_be_accepted() {
        // The confidences of the longer block are 1, 0 and 1, smoothed 1, 1/2 and 1, so up to each of
        // its positions all is accepted with the probabilities 1, 1/2 and 1/2. If all were certain, the
        // weights would be 3, 2 and 1: 2 on average. The shorter block has 1/2, and 1 on average.
        let expected = [1.0, 0.5, 0.5, 0.25];
        assert_eq!(weights(1.0, PositionWeights::Acceptance), expected);
        assert_eq!(weights(0.5, PositionWeights::Acceptance), [1.0, 0.5, 0.5, 0.125]);
    }

    #[test]
    fn uniform_weights_cost_nothing() {
        let chunk =
            Chunk { noisy_rows: vec![3], noisy_labels: vec![1], noisy_blocks: vec![vec![0]], ..Chunk::default() };
        assert!(BlockWeights::new(&Settings::plain().consistency, &chunk, Device::Cpu).unwrap().is_none());
    }
}
