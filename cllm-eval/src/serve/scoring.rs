//! Log-probabilities of the tokens of a text, piece by piece, so that scoring a long text does not
//! hold up the answers that are decoded meanwhile, and one that grows is scored as it grows.

use cllm_core::Result;
use cllm_core::model::{KvCache, SlotMapping, Transformer};
use tch::{Kind, Tensor};

/// Tokens of a piece. Their logits are in memory at once.
const PIECE_TOKENS: usize = 256;

/// How probable a token of a text is after those before it.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct TokenScore {
    pub(super) logprob: f64,
    /// The likeliest tokens there, with their log-probabilities, the likeliest first.
    pub(super) top: Vec<(i32, f64)>,
}

/// A text, which may grow, of which the first part is scored.
pub(super) struct Scoring {
    ids: Vec<i32>,
    num_top: usize,
    /// Index of the first token whose score is asked for.
    first_scored: usize,
    cache: KvCache,
    num_read: usize,
}

impl Scoring {
    /// A text that begins with `ids` and has room for `max_new_tokens` more. Its tokens have scores
    /// from `first_scored` on.
    ///
    /// # Errors
    /// libtorch's, for lack of memory.
    pub(super) fn new(
        model: &Transformer,
        ids: Vec<i32>,
        max_new_tokens: usize,
        first_scored: usize,
        num_top: usize,
    ) -> Result<Self> {
        let cache = KvCache::new(model.config(), 1, ids.len() + max_new_tokens, model.device(), model.kind())?;
        Ok(Scoring { ids, num_top, first_scored, cache, num_read: 0 })
    }

    pub(super) fn push(&mut self, ids: &[i32]) {
        self.ids.extend(ids);
    }

    /// Number of tokens that its cache has room for.
    pub(super) fn capacity(&self) -> usize {
        self.cache.capacity()
    }

    /// Number of tokens to read. The last one is none of them: it predicts nothing that is asked for.
    pub(super) fn num_unread(&self) -> usize {
        self.ids.len().saturating_sub(self.num_read + 1)
    }

    pub(super) fn is_scored(&self) -> bool {
        self.num_unread() == 0
    }

    /// Reads the next piece, and returns the scores of the tokens after those read. The first token of
    /// a text has none.
    ///
    /// # Errors
    /// libtorch's. The forward itself panics for lack of memory.
    pub(super) fn step(&mut self, model: &Transformer) -> Result<Vec<TokenScore>> {
        if self.is_scored() {
            return Ok(Vec::new());
        }
        let _no_grad = tch::no_grad_guard();
        let piece = self.num_read..(self.num_read + PIECE_TOKENS).min(self.ids.len() - 1);
        let num_unscored = self.first_scored.saturating_sub(piece.start + 1).min(piece.len());
        let to_device = |ids: &[i32]| Tensor::f_from_slice(ids)?.f_to_kind(Kind::Int64)?.f_to_device(model.device());
        let tokens = to_device(&self.ids[piece.clone()])?.f_unsqueeze(0)?;
        let slots = Tensor::f_arange_start(piece.start as i64, piece.end as i64, (Kind::Int64, model.device()))?;
        let mapping = SlotMapping::sequential(slots.f_unsqueeze(0)?);
        let hidden = model.forward_cached(&tokens, &mapping, &[piece.len()], &mut self.cache, piece.end, None);
        self.num_read = piece.end;
        if num_unscored == piece.len() {
            return Ok(Vec::new());
        }
        // Logits are large: a vocabulary of them for each token.
        let hidden = hidden.f_slice(0, num_unscored as i64, None, 1)?;
        let targets = to_device(&self.ids[piece.start + num_unscored + 1..=piece.end])?;
        scores(&model.compute_logits(&hidden)?, &targets, self.num_top)
    }
}

/// The scores of `targets [T]` by logits `[T, vocab]`. The softmax is computed in float32.
fn scores(logits: &Tensor, targets: &Tensor, num_top: usize) -> Result<Vec<TokenScore>> {
    let logprobs = logits.f_log_softmax(-1, Kind::Float)?;
    let of_targets: Vec<f32> = Vec::try_from(logprobs.f_gather(1, &targets.f_unsqueeze(1)?, false)?.f_view([-1])?)?;
    let (top, ids) = logprobs.f_topk(num_top as i64, -1, true, true)?;
    let top: Vec<f32> = Vec::try_from(top.f_view([-1])?)?;
    let ids: Vec<i32> = Vec::try_from(ids.f_to_kind(Kind::Int)?.f_view([-1])?)?;
    let mut likeliest = ids.into_iter().zip(top.into_iter().map(f64::from));
    let score =
        |logprob: f32| TokenScore { logprob: f64::from(logprob), top: likeliest.by_ref().take(num_top).collect() };
    Ok(of_targets.into_iter().map(score).collect())
}

#[cfg(test)]
mod tests {
    use cllm_core::model::ModelConfig;
    use tch::Device;

    use super::*;

    #[test]
    fn scores_in_pieces_are_those_of_the_whole_text() {
        let config = serde_json::json!({
            "model_type": "llama", "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "tie_word_embeddings": false,
        });
        let model = Transformer::random(ModelConfig::from_json(&config).unwrap(), 3, Device::Cpu, Kind::Float);
        let ids: Vec<i32> = (0..600).map(|position| position * position % 47).collect();
        // Known from the start, or growing.
        let mut scoring = Scoring::new(&model, ids[..300].to_vec(), 300, 1, 3).unwrap();
        let (mut scores, mut num_steps) = (Vec::new(), 0);
        for more in [&[][..], &ids[300..301], &ids[301..304], &ids[304..]] {
            scoring.push(more);
            while !scoring.is_scored() {
                scores.extend(scoring.step(&model).unwrap());
                num_steps += 1;
            }
        }
        assert_eq!((num_steps, scores.len()), (6, 599));
        let tokens = Tensor::from_slice(&ids).to_kind(Kind::Int64).unsqueeze(0);
        let positions = Tensor::arange(600, (Kind::Int64, Device::Cpu)).unsqueeze(0);
        let logits = tch::no_grad(|| model.compute_logits(&model.forward(&tokens, &positions))).unwrap().squeeze_dim(0);
        for (position, score) in scores.iter().enumerate() {
            let row: Vec<f64> = Vec::try_from(logits.get(position as i64).to_kind(Kind::Double)).unwrap();
            let total: f64 = row.iter().map(|logit| logit.exp()).sum();
            let expected = (row[ids[position + 1] as usize].exp() / total).ln();
            assert!((score.logprob - expected).abs() < 1e-4, "{position}: {score:?}, {expected}");
            let best = (0..50).max_by(|&one, &other| row[one].total_cmp(&row[other])).unwrap();
            assert_eq!((score.top.len(), score.top[0].0), (3, best as i32));
        }
        // From a token on: the first piece has none.
        let mut scoring = Scoring::new(&model, ids, 0, 500, 3).unwrap();
        let nums = [0, 256 * 2 + 1 - 500, 599 - 256 * 2];
        let parts = nums.map(|num| scoring.step(&model).inspect(|part| assert_eq!(part.len(), num)).unwrap());
        for (part, whole) in parts.concat().iter().zip(&scores[499..]) {
            assert!(
                (part.logprob - whole.logprob).abs() < 1e-4 && part.top[0].0 == whole.top[0].0,
                "{part:?} {whole:?}"
            );
        }
        assert!(scoring.is_scored());
        // A text of one token has nothing to score.
        let mut scoring = Scoring::new(&model, vec![1], 0, 1, 0).unwrap();
        assert!(scoring.is_scored() && scoring.step(&model).unwrap().is_empty());
    }
}
