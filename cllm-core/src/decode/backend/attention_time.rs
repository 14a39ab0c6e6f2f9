//! How long the attention of a step takes by itself.

use std::time::Instant;

use tch::{Device, Kind, Tensor};

use super::cuda_model::CudaModel;
use crate::cuda::forward_input::{ForwardShape, InputToken, SamplingOptions};
use crate::cuda::graph_runner::GraphRunner;
use crate::model::Transformer;
use crate::statistics::median;
use crate::{Error, Result};

/// Number of times that a launch computes the attention of every layer, so that the launch itself
/// hardly counts.
const NUM_ROUNDS: usize = 8;
const NUM_WARM_UPS: usize = 2;
const NUM_REPEATS: usize = 10;

/// Median seconds of the attention of all layers for the last `num_tokens` of a sequence, with
/// `context` tokens before them: with the rotation of queries and keys, and the caching of keys and
/// values. `None` if our kernels do not decode the model.
///
/// # Errors
/// [`Error::Torch`] if memory runs out or the driver fails.
#[allow(unsafe_code)]
pub fn attention_seconds(model: &Transformer, num_tokens: usize, context: usize) -> Result<Option<f64>> {
    let Device::Cuda(gpu) = model.device() else { return Ok(None) };
    let Some(cuda_model) = CudaModel::new(model, 1, context + num_tokens, false)? else { return Ok(None) };
    let config = model.config();
    let random = |num_heads: i64| {
        Tensor::f_randn([num_tokens as i64, num_heads * config.head_dim], (Kind::BFloat16, model.device()))
    };
    let (qkv, attn_out) = (random(config.num_heads + 2 * config.num_kv_heads)?, random(config.num_heads)?);
    let num_tiles = cuda_model.max_tiles(num_tokens);
    let shape = ForwardShape { num_tokens, num_outputs: 0, num_tiles, has_adapted: false, shared: None };
    // Nothing is sampled.
    let sampling = SamplingOptions { is_greedy: true, gives_candidates: false, has_nucleus: false };
    // Dropped before the tensors, for which it waits.
    let mut runner = GraphRunner::new(gpu, cuda_model.input_limits())?;
    let mut seconds = Vec::new();
    for _ in 0..NUM_WARM_UPS + NUM_REPEATS {
        let token = |i| InputToken { id: 0, position: context + i, visible: u64::MAX, draw: None, is_adapted: false };
        runner.write_input(shape)?.push_row(0, context, (0..num_tokens).map(token))?;
        let started = Instant::now();
        // SAFETY: the weights, the cache and both tensors outlive the runner.
        unsafe {
            runner.launch(sampling, |input, _| {
                (0..NUM_ROUNDS).try_for_each(|_| cuda_model.attention_alone(input, &qkv, &attn_out))
            })?;
        }
        runner.results()?;
        seconds.push(started.elapsed().as_secs_f64() / NUM_ROUNDS as f64);
    }
    let median = median(seconds.into_iter().skip(NUM_WARM_UPS));
    median.map(Some).ok_or_else(|| Error::internal("nothing was timed"))
}
