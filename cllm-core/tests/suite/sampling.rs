//! Sampled answers follow the softmax of the model, with every strategy.

use cllm_core::decode::{Answer, DecodeOptions, Decoder, Request, Sampling, StopConditions, Strategy, required_slots};
use cllm_core::model::Transformer;
use tch::{Device, IndexOp, Kind, Tensor};

use crate::models::random_model;

/// Token ids are counted modulo this; otherwise there would be too many different answers to count.
const NUM_GROUPS: i64 = 8;

/// Answers to sample: `num_answers` times the same prompt.
pub struct Draws {
    pub prompt: Vec<i32>,
    /// Tokens of each answer.
    pub num_tokens: usize,
    pub temperature: f64,
    pub num_answers: usize,
    pub max_sequences: usize,
}

/// How far the sampled answers are from their probabilities.
#[derive(Debug)]
pub struct Misfit {
    /// Pearson's sum over cells. A cell is a sequence of groups of token ids, one of [`NUM_GROUPS`]
    /// for each token; cells that are expected fewer than five times are counted as one.
    pub chi_squared: f64,
    /// A correct sampler exceeds this once in 30,000 runs. It allows for the rounding of the
    /// sampled model.
    pub allowed: f64,
    pub num_forwards: usize,
}

/// One cell: how many answers fell into it, how many were expected, and how many were expected of
/// the model that rounds.
#[derive(Debug, Clone, Copy, Default)]
struct Cell {
    counted: f64,
    expected: f64,
    rounded: f64,
}

impl Draws {
    /// Samples with `model` and compares with the probabilities of `exact`, which has the same
    /// weights.
    pub fn misfit(&self, model: &Transformer, exact: &Transformer, strategy: Strategy, seed: u64) -> Misfit {
        let (counts, num_forwards) = self.counts(model, strategy, seed);
        let (expected, rounded) = (self.probabilities(exact), self.probabilities(model));
        let draws = self.num_answers as f64;
        // The first cell collects all rare ones.
        let mut cells = vec![Cell::default()];
        for (counted, (expected, rounded)) in counts.into_iter().zip(expected.iter().zip(&rounded)) {
            let cell = Cell { counted, expected: expected * draws, rounded: rounded * draws };
            if cell.expected < 5.0 {
                cells[0].counted += cell.counted;
                cells[0].expected += cell.expected;
                cells[0].rounded += cell.rounded;
            } else {
                cells.push(cell);
            }
        }
        cells.retain(|cell| cell.expected > 0.0);
        let chi_squared = cells.iter().map(|cell| (cell.counted - cell.expected).powi(2) / cell.expected).sum();
        let rounding: f64 = cells.iter().map(|cell| (cell.rounded - cell.expected).powi(2) / cell.expected).sum();
        assert!(cells.len() > 10, "too few different answers for a test: {cells:?}");
        Misfit { chi_squared, allowed: quantile(cells.len() as f64 - 1.0, 4.0) + 4.0 * rounding, num_forwards }
    }

    /// The number of answers in each cell, and the forwards of all.
    fn counts(&self, model: &Transformer, strategy: Strategy, seed: u64) -> (Vec<f64>, usize) {
        let stop = StopConditions::new(self.num_tokens, Vec::new());
        let sampling = Sampling::Temperature(self.temperature);
        let options = DecodeOptions { sampling, ..DecodeOptions::greedy(strategy, seed) };
        let capacity = required_slots(self.prompt.len(), &stop, strategy);
        let mut decoder = Decoder::new(model, self.max_sequences, capacity).unwrap();
        let mut requests =
            (0..self.num_answers).map(|draw| Request { sample_id: draw.to_string(), prompt_ids: self.prompt.clone() });
        let (mut counts, mut num_forwards) = (vec![0.0; NUM_GROUPS.pow(self.num_tokens as u32) as usize], 0);
        let mut count = |_: usize, answer: Answer| {
            let groups = answer.response_ids.iter().map(|&id| i64::from(id) % NUM_GROUPS);
            counts[groups.fold(0, |cell, group| cell * NUM_GROUPS + group) as usize] += 1.0;
            num_forwards += answer.num_forwards;
            Ok(())
        };
        decoder.stream(&mut requests, &stop, options, &mut count).unwrap();
        (counts, num_forwards)
    }

    /// The probability of each cell: products of softmaxes, from one uncached forward over every
    /// possible prefix of an answer.
    fn probabilities(&self, model: &Transformer) -> Vec<f64> {
        let _no_grad = tch::no_grad_guard();
        let (vocab, device) = (model.config().vocab_size, model.device());
        let prefix_len = self.num_tokens as i64 - 1;
        let ids = Tensor::arange(vocab, (Kind::Int64, Device::Cpu));
        let prefixes = Tensor::cartesian_prod(&vec![&ids; self.num_tokens - 1]).view([-1, prefix_len]);
        let prompt: Vec<i64> = self.prompt.iter().map(|&id| id.into()).collect();
        let prompt = Tensor::from_slice(&prompt).expand([prefixes.size()[0], prompt.len() as i64], false);
        let tokens = Tensor::cat(&[prompt, prefixes.shallow_clone()], 1);
        let positions = Tensor::arange(tokens.size()[1], (Kind::Int64, device)).expand_as(&tokens);
        let first = self.prompt.len() as i64 - 1;
        let logits =
            model.compute_logits(&model.forward(&tokens.to_device(device), &positions).i((.., first..))).unwrap();
        let softmax = (logits.to_device(Device::Cpu).to_kind(Kind::Double) / self.temperature).softmax(-1, None);
        let mut probabilities = softmax.i((.., prefix_len));
        let mut cells = Tensor::zeros([1, 1], (Kind::Int64, Device::Cpu));
        for position in 0..prefix_len {
            let column = prefixes.narrow(1, position, 1);
            probabilities *= softmax.i((.., position)).gather(1, &column, false);
            cells = cells * NUM_GROUPS + column.remainder(NUM_GROUPS);
        }
        let cells = cells * NUM_GROUPS + ids.remainder(NUM_GROUPS);
        let sums = Tensor::zeros([NUM_GROUPS.pow(self.num_tokens as u32)], (Kind::Double, Device::Cpu));
        Vec::try_from(sums.index_add(0, &cells.flatten(0, -1), &probabilities.flatten(0, -1))).unwrap()
    }
}

/// The value that a chi-squared variable exceeds as rarely as a normal variable exceeds
/// `deviations` standard deviations (Wilson and Hilferty, 1931).
fn quantile(degrees_of_freedom: f64, deviations: f64) -> f64 {
    let term = 2.0 / (9.0 * degrees_of_freedom);
    degrees_of_freedom * (1.0 - term + deviations * term.sqrt()).powi(3)
}

#[test]
fn every_strategy_samples_from_the_softmax() {
    let config = serde_json::json!({
        "model_type": "llama", "vocab_size": 6, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "tie_word_embeddings": true,
    });
    let model = random_model(&config);
    // N-grams of the prompt repeat, so lookahead has candidates.
    let prompt = vec![1, 2, 3, 4, 1, 2, 3, 0, 1, 2, 5, 5, 1];
    let draws = Draws { prompt, num_tokens: 3, temperature: 1.0, num_answers: 20_000, max_sequences: 500 };
    let strategies = [Strategy::Ar, Strategy::rolling(4), Strategy::lookahead()];
    for (strategy, seed) in strategies.into_iter().zip([11, 12, 13]) {
        let misfit = draws.misfit(&model, &model, strategy, seed);
        assert!(misfit.chi_squared < misfit.allowed, "{strategy:?}: {misfit:?}");
        let num_autoregressive = draws.num_answers * draws.num_tokens;
        let saves_none = misfit.num_forwards == num_autoregressive;
        assert_eq!(saves_none, strategy == Strategy::Ar, "{strategy:?} accepts draft tokens: {misfit:?}");
    }
}
