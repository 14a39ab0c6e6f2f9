//! Drawn answers follow the softmax of the model, whatever the strategy.

use cllm_core::decode::{Answer, DecodeOptions, Decoder, Request, Sampling, StopConditions, Strategy, required_slots};
use cllm_core::model::Transformer;
use tch::{Device, IndexOp, Kind, Tensor};

use crate::models::random_model;

/// Tokens are told apart by their ids modulo this, or there would be too many answers to count.
const GROUPS: i64 = 8;

/// Answers to draw: so many tokens each, to one prompt.
pub struct Draws {
    pub prompt: Vec<i32>,
    pub tokens: usize,
    pub temperature: f64,
    pub count: usize,
    pub rows: usize,
}

/// How far the answers that were drawn are from their probabilities.
#[derive(Debug)]
pub struct Misfit {
    /// Pearson's sum over cells: answers of which each token is in the same of [`GROUPS`] groups. Cells that are expected fewer than
    /// five times count as one.
    pub chi_squared: f64,
    /// What it passes once in 30,000 times if all is well, and what the drawing model's rounding may add.
    pub allowed: f64,
    pub forwards: usize,
}

impl Draws {
    /// Draws with `model` and compares with the probabilities of `exact`, which has the same weights.
    pub fn misfit(&self, model: &Transformer, exact: &Transformer, strategy: Strategy, seed: u64) -> Misfit {
        let (counts, forwards) = self.counts(model, strategy, seed);
        let (wanted, rounded) = (self.probabilities(exact), self.probabilities(model));
        let draws = self.count as f64;
        // Counted, expected, and expected of a model that rounds; the first stands for all rare ones.
        let mut cells = vec![(0.0, 0.0, 0.0)];
        for (count, (wanted, rounded)) in counts.iter().zip(wanted.iter().zip(&rounded)) {
            let cell = (*count, wanted * draws, rounded * draws);
            if cell.1 < 5.0 {
                cells[0] = (cells[0].0 + cell.0, cells[0].1 + cell.1, cells[0].2 + cell.2);
            } else {
                cells.push(cell);
            }
        }
        cells.retain(|cell| cell.1 > 0.0);
        let chi_squared = cells.iter().map(|(counted, wanted, _)| (counted - wanted).powi(2) / wanted).sum();
        let rounding: f64 = cells.iter().map(|(_, wanted, rounded)| (rounded - wanted).powi(2) / wanted).sum();
        assert!(cells.len() > 10, "the answers are too much alike to say anything: {cells:?}");
        Misfit { chi_squared, allowed: quantile(cells.len() as f64 - 1.0, 4.0) + 4.0 * rounding, forwards }
    }

    /// How often an answer of each cell came, and the forwards of all.
    fn counts(&self, model: &Transformer, strategy: Strategy, seed: u64) -> (Vec<f64>, usize) {
        let stop = StopConditions { max_new_tokens: self.tokens, eos_ids: Vec::new() };
        let options = DecodeOptions {
            sampling: Sampling::Temperature(self.temperature),
            ..DecodeOptions::greedy(strategy, seed)
        };
        let mut decoder = Decoder::new(model, self.rows, required_slots(self.prompt.len(), &stop, strategy)).unwrap();
        let mut requests =
            (0..self.count).map(|draw| Request { sample_id: draw.to_string(), prompt_ids: self.prompt.clone() });
        let (mut counts, mut forwards) = (vec![0.0; GROUPS.pow(self.tokens as u32) as usize], 0);
        let mut count = |_: usize, answer: Answer| {
            let groups = answer.response_ids.iter().map(|&id| i64::from(id) % GROUPS);
            counts[groups.fold(0, |cell, group| cell * GROUPS + group) as usize] += 1.0;
            forwards += answer.num_forwards;
            Ok(())
        };
        decoder.stream(&mut requests, &stop, options, &mut count).unwrap();
        (counts, forwards)
    }

    /// The probability of each cell: products of softmaxes, from one uncached pass over every beginning of an answer.
    fn probabilities(&self, model: &Transformer) -> Vec<f64> {
        let _no_grad = tch::no_grad_guard();
        let (vocab, device) = (model.config().vocab_size, model.device());
        let known = self.tokens as i64 - 1;
        let ids = Tensor::arange(vocab, (Kind::Int64, Device::Cpu));
        let beginnings = Tensor::cartesian_prod(&vec![&ids; self.tokens - 1]).view([-1, known]);
        let prompt: Vec<i64> = self.prompt.iter().map(|&id| id.into()).collect();
        let prompt = Tensor::from_slice(&prompt).expand([beginnings.size()[0], prompt.len() as i64], false);
        let tokens = Tensor::cat(&[prompt, beginnings.shallow_clone()], 1);
        let positions = Tensor::arange(tokens.size()[1], (Kind::Int64, device)).expand_as(&tokens);
        let first = self.prompt.len() as i64 - 1;
        let logits =
            model.compute_logits(&model.forward(&tokens.to_device(device), &positions).i((.., first..))).unwrap();
        let softmax = (logits.to_device(Device::Cpu).to_kind(Kind::Double) / self.temperature).softmax(-1, None);
        let mut all = softmax.i((.., known));
        let mut cells = Tensor::zeros([1, 1], (Kind::Int64, Device::Cpu));
        for place in 0..known {
            let column = beginnings.narrow(1, place, 1);
            all *= softmax.i((.., place)).gather(1, &column, false);
            cells = cells * GROUPS + column.remainder(GROUPS);
        }
        let cells = cells * GROUPS + ids.remainder(GROUPS);
        let sums = Tensor::zeros([GROUPS.pow(self.tokens as u32)], (Kind::Double, Device::Cpu));
        Vec::try_from(sums.index_add(0, &cells.flatten(0, -1), &all.flatten(0, -1))).unwrap()
    }
}

/// What a chi-squared sum passes as seldom as a normal variable passes so many deviations (Wilson and Hilferty, 1931).
fn quantile(freedom: f64, deviations: f64) -> f64 {
    let part = 2.0 / (9.0 * freedom);
    freedom * (1.0 - part + deviations * part.sqrt()).powi(3)
}

#[test]
fn every_strategy_draws_from_the_softmax() {
    let config = serde_json::json!({
        "model_type": "llama", "vocab_size": 6, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "tie_word_embeddings": true,
    });
    let model = random_model(&config);
    // Its n-grams come again, so that there are candidates to guess.
    let prompt = vec![1, 2, 3, 4, 1, 2, 3, 0, 1, 2, 5, 5, 1];
    let draws = Draws { prompt, tokens: 3, temperature: 1.0, count: 20_000, rows: 500 };
    let strategies = [Strategy::Ar, Strategy::rolling(4), Strategy::lookahead()];
    for (strategy, seed) in strategies.into_iter().zip([11, 12, 13]) {
        let found = draws.misfit(&model, &model, strategy, seed);
        assert!(found.chi_squared < found.allowed, "{strategy:?}: {found:?}");
        let one_by_one = draws.count * draws.tokens;
        assert_eq!(found.forwards == one_by_one, strategy == Strategy::Ar, "{strategy:?} accepts guesses: {found:?}");
    }
}
