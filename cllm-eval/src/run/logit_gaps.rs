//! Logit gaps: how close the two best tokens were where an answer first differs from the
//! autoregressive one. A gap near 0 means that rounding decided; a large one means a fault.

use std::collections::HashMap;

use cllm_core::decode::Strategy;
use cllm_core::model::Transformer;
use cllm_core::{Result, interrupt};
use tch::{Kind, Tensor};

use super::models::LoadedModel;
use crate::records::AnswerRecord;
use crate::role::Role;

/// Fills in the missing logit gaps of a model's answers that differ from its autoregressive answers
/// to the same prompts, which `ar_role` has.
///
/// # Errors
/// libtorch's errors; interruption.
pub(super) fn add(model: &LoadedModel, ar_role: Role, answers: &mut [AnswerRecord]) -> Result<()> {
    let ar: HashMap<usize, (String, Vec<i32>)> = answers
        .iter()
        .filter(|answer| answer.role == ar_role && answer.strategy == Strategy::Ar)
        .map(|answer| (answer.index, (answer.prompt.clone(), answer.response_ids.clone())))
        .collect();
    let is_open = |answer: &&mut AnswerRecord| answer.role == model.role && answer.logit_gap_at_difference.is_none();
    for answer in answers.iter_mut().filter(is_open) {
        // Second turns have different prompts if the answers to the first turn differ.
        let Some((_, ar_ids)) = ar.get(&answer.index).filter(|(prompt, _)| *prompt == answer.prompt) else { continue };
        let Some(position) = first_difference(ar_ids, &answer.response_ids) else { continue };
        interrupt::check()?;
        let prompt_ids = &model.prompts.get(answer.index).request.prompt_ids;
        let ids = [prompt_ids, &ar_ids[..position]].concat();
        answer.logit_gap_at_difference = Some(logit_gap(&model.model, &ids)?);
    }
    Ok(())
}

/// The first position at which two answers have different tokens.
fn first_difference(one: &[i32], other: &[i32]) -> Option<usize> {
    one.iter().zip(other).position(|(one, other)| one != other)
}

/// The best minus the second-best logit of the token after `ids`.
fn logit_gap(model: &Transformer, ids: &[i32]) -> Result<f64> {
    let _no_grad = tch::no_grad_guard();
    let device = model.device();
    let tokens = Tensor::from_slice(ids).to_kind(Kind::Int64).to_device(device).unsqueeze(0);
    let positions = Tensor::arange(ids.len() as i64, (Kind::Int64, device)).unsqueeze(0);
    let last = model.forward(&tokens, &positions).select(1, -1);
    let (best, _) = model.compute_logits(&last)?.topk(2, -1, true, true);
    Ok(best.double_value(&[0, 0]) - best.double_value(&[0, 1]))
}

#[cfg(test)]
mod tests {
    use cllm_core::decode::{DecodeOptions, Request, StopConditions, decode};
    use cllm_core::model::ModelConfig;
    use tch::Device;

    use super::*;

    #[test]
    fn the_gap_is_that_of_the_logits_after_the_common_tokens() {
        assert_eq!(first_difference(&[1, 2, 3], &[1, 2, 3]), None);
        assert_eq!(first_difference(&[1, 2, 3], &[1, 4, 3]), Some(1));
        let config = serde_json::json!({
            "model_type": "llama", "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "tie_word_embeddings": true,
        });
        let model = Transformer::random(ModelConfig::from_json(&config).unwrap(), 5, Device::Cpu, Kind::Float);
        let requests = [Request { sample_id: "s".to_owned(), prompt_ids: vec![3, 7, 9] }];
        let stop = StopConditions::new(8, vec![]);
        let options = DecodeOptions::greedy(Strategy::Ar, 0);
        let (answers, _) = decode(&model, &requests, &stop, options).unwrap();
        let ids = [&requests[0].prompt_ids[..], &answers[0].response_ids].concat();
        // One forward over the whole answer gives the logits after each of its prefixes.
        let tokens = Tensor::from_slice(&ids).to_kind(Kind::Int64).unsqueeze(0);
        let positions = Tensor::arange(ids.len() as i64, (Kind::Int64, Device::Cpu)).unsqueeze(0);
        let logits = tch::no_grad(|| model.compute_logits(&model.forward(&tokens, &positions))).unwrap();
        for end in 3..ids.len() {
            let mut row: Vec<f64> = Vec::try_from(logits.get(0).get(end as i64 - 1).to_kind(Kind::Double)).unwrap();
            let chosen = row[ids[end] as usize];
            row.sort_by(|a, b| b.total_cmp(a));
            assert_eq!(chosen, row[0]);
            let gap = logit_gap(&model, &ids[..end]).unwrap();
            assert!((gap - (row[0] - row[1])).abs() < 1e-5, "{end}: {gap}");
        }
    }
}
