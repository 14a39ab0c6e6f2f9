//! AdamW over flat buffers, with its state sharded over the processes (ZeRO stage 1; Rajbhandari et
//! al., arXiv 1910.02054), and its gradients too where that costs nothing (ZeRO stage 2).
//!
//! Every process holds all weights. Each updates its own shard of them, for which it alone holds the
//! state; the shards are gathered afterwards. Clipping, and skipping a
//! step whose gradient is not finite, are decided on the device, so a step never waits for it.

mod adamw_bf16;
mod ema;
mod gradients;
mod lr_schedule;

use std::ops::Range;
use std::rc::Rc;

use cllm_core::cuda::libtorch::{self, AdamW};
use cllm_core::cuda::optimizer::{AdamWKernels, RoundingNoise};
use cllm_core::distributed::ProcessGroup;
use cllm_core::model::{ParamBuffer, Transformer};
use cllm_core::{Error, Result, fingerprint};
use rand::Rng;
use tch::{Kind, Tensor};

use crate::settings::{OptimizerSettings, Settings, StateDtype};
use ema::Ema;
pub use gradients::Gradients;
pub use lr_schedule::learning_rate;

/// Name of the master weights in a checkpoint.
pub const MASTER_WEIGHTS: &str = "master_weights";

/// The average is updated by at most this many weights at a time, which bounds their float32 copies.
pub const MAX_AVERAGED_ELEMENTS: i64 = 1 << 26;

/// Shards of the weights begin at multiples of so many elements.
const SHARD_ALIGNMENT: usize = 8;

/// The weights of a model, their gradients, and this process's shard of the optimizer's state.
/// Shards are `[elements]`.
pub struct OptimizerState {
    settings: OptimizerSettings,
    group: Rc<ProcessGroup>,
    /// `None` where libtorch's operations update the weights: on the CPU, and float32 weights.
    kernels: Option<AdamWKernels>,
    weights: ParamBuffer,
    gradients: Gradients,
    /// The weights that the update changes. If the types allow it, this is the shard of the weights
    /// itself, not a copy.
    master_weights: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    ema: Option<Ema>,
    /// Seeds stochastic rounding.
    seed: u64,
    /// Steps skipped so far, in total and in a row up to the last step; float32 scalars on the
    /// device.
    num_skipped: Tensor,
    num_skipped_in_a_row: Tensor,
}

/// Steps that were skipped because a gradient was not finite.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SkippedSteps {
    pub total: usize,
    /// Number of skipped steps in a row up to the last step; 0 if the last step was not skipped.
    pub in_a_row: usize,
}

/// Refuses a number of processes that cannot own equal shards of the weights, aligned to
/// [`SHARD_ALIGNMENT`] of them.
fn check_divides(num_weights: usize, world_size: usize) -> Result<()> {
    let divides = |num_processes: &usize| num_weights.is_multiple_of(SHARD_ALIGNMENT * num_processes);
    if divides(&world_size) {
        return Ok(());
    }
    let fewer = (1..world_size).rev().find(divides).unwrap_or(1);
    let advice = match (world_size..=2 * world_size).find(divides) {
        Some(more) => format!("start {fewer} or {more}"),
        None => format!("start {fewer}"),
    };
    Err(Error::usage(format!("the weights cannot be divided among {world_size} processes: {advice}")))
}

/// Parameters of one update that are the same for every element.
struct Update {
    lr: f64,
    /// Number of the step, from 1.
    number: usize,
    /// Divisor of the gradients that clips them; float32 scalar.
    scale: Tensor,
    /// Float32 scalar: 1 skips the update, 0 applies it.
    skip: Tensor,
}

impl OptimizerState {
    /// Initial state for the trainable weights of a model, which collects gradients from now on.
    ///
    /// # Errors
    /// [`Error::Usage`] for a bfloat16 state with other weights, or a number of processes that does
    /// not divide the weights; [`Error::Torch`], for example when memory runs out.
    pub fn new(model: &Transformer, run: &Settings, group: Rc<ProcessGroup>) -> Result<Self> {
        let _no_grad = tch::no_grad_guard();
        let settings = &run.optimizer;
        let is_bf16 = settings.state_dtype == StateDtype::Bfloat16;
        if is_bf16 && model.kind() != Kind::BFloat16 {
            return Err(Error::usage(
                "optimizer.state_dtype=bfloat16 needs bfloat16 weights, as on a GPU: on the CPU they are float32",
            ));
        }
        let weights = model.trainable().shallow_clone();
        check_divides(weights.buffer().numel(), group.world_size())?;
        let kind = if is_bf16 { Kind::BFloat16 } else { Kind::Float };
        // `to_kind` copies only if the type differs.
        let master_weights = group.shard(weights.buffer()).to_kind(kind);
        let zero = || Tensor::zeros([], (Kind::Float, model.device()));
        let kernels = if weights.kind() == Kind::BFloat16 { AdamWKernels::new(model.device())? } else { None };
        Ok(OptimizerState {
            settings: settings.clone(),
            kernels,
            gradients: Gradients::new(model, Rc::clone(&group), run.shards_gradients(group.world_size()))?,
            exp_avg: master_weights.f_zeros_like()?,
            exp_avg_sq: master_weights.f_zeros_like()?,
            ema: settings.ema_decay.map(|decay| Ema::new(&master_weights, decay)),
            master_weights,
            weights,
            group,
            seed: run.seed,
            num_skipped: zero(),
            num_skipped_in_a_row: zero(),
        })
    }

    /// Updates the weights from the gradients collected by all processes, and clears the gradients.
    /// `number` counts steps from 1. If the norm of the gradient is not finite, the step changes
    /// nothing and is counted. Returns the norm before clipping, on the device.
    ///
    /// # Errors
    /// libtorch's errors, a process that has died.
    pub fn step(&mut self, lr: f64, number: usize) -> Result<Tensor> {
        let _no_grad = tch::no_grad_guard();
        let gradients = self.gradients.sums()?;
        let squared_norm = gradients.f_norm_scalaropt_dtype(2, Kind::Float)?.square();
        self.group.all_reduce(&squared_norm)?;
        let norm = squared_norm.sqrt();
        let scale = match self.settings.max_grad_norm {
            Some(max_norm) => (&norm / max_norm).clamp_min(1.0),
            None => Tensor::ones_like(&norm),
        };
        let skip = norm.isfinite().logical_not().to_kind(Kind::Float);
        let update = Update { lr, number, scale, skip };
        self.update_shard(&update, &gradients)?;
        self.group.all_gather(self.weights.buffer())?;
        if let Some(ema) = &self.ema {
            ema.update(&self.master_weights, number, MAX_AVERAGED_ELEMENTS)?;
        }
        // Cleared only after the update: in a single process `gradients` is a view of them.
        self.gradients.clear();
        self.num_skipped += &update.skip;
        self.num_skipped_in_a_row = (&self.num_skipped_in_a_row + 1.0) * &update.skip;
        Ok(norm)
    }

    /// Updates this process's shard, matrices with weight decay and vectors without.
    fn update_shard(&self, update: &Update, gradients: &Tensor) -> Result<()> {
        let num_elements = self.master_weights.numel() as i64;
        let first_element = self.group.rank() as i64 * num_elements;
        let num_in_matrices = (self.weights.num_matrix_elements() - first_element).clamp(0, num_elements);
        let seed = fingerprint::derive_seed(self.seed, &update.number.to_string());
        if let Some(kernels) = &self.kernels {
            let (numbers, num_decayed) = (self.adamw(update, self.settings.weight_decay), num_in_matrices as usize);
            let state = [&self.master_weights, &self.exp_avg, &self.exp_avg_sq];
            return match self.settings.state_dtype {
                StateDtype::Bfloat16 => {
                    let noise = RoundingNoise { seed, first_element: first_element as usize };
                    kernels.step_bf16(&numbers, num_decayed, gradients, state, noise)
                }
                StateDtype::Float32 => {
                    let weights = self.group.shard(self.weights.buffer());
                    kernels.step_float32(&numbers, num_decayed, gradients, state, &weights)
                }
            };
        }
        let mut noise = fingerprint::derive_rng(seed, "rounding", self.group.rank() as u64);
        let (matrices, vectors) = (0..num_in_matrices, num_in_matrices..num_elements);
        for (elements, weight_decay) in [(matrices, self.settings.weight_decay), (vectors, 0.0)] {
            self.update_elements(&self.adamw(update, weight_decay), gradients, elements, &mut noise)?;
        }
        Ok(())
    }

    fn adamw<'u>(&self, update: &'u Update, weight_decay: f64) -> AdamW<'u> {
        AdamW {
            lr: update.lr,
            beta1: self.settings.beta1,
            beta2: self.settings.beta2,
            weight_decay,
            eps: self.settings.eps,
            step: update.number,
            scale: &update.scale,
            skip: &update.skip,
        }
    }

    /// Updates some elements of the shard with libtorch's operations.
    fn update_elements(
        &self,
        params: &AdamW<'_>,
        gradients: &Tensor,
        elements: Range<i64>,
        noise: &mut impl Rng,
    ) -> Result<()> {
        let slice = |shard: &Tensor| shard.narrow(0, elements.start, elements.end - elements.start);
        let master_weights = slice(&self.master_weights);
        let (exp_avg, exp_avg_sq) = (slice(&self.exp_avg), slice(&self.exp_avg_sq));
        let gradients = slice(gradients).to_kind(Kind::Float);
        if self.settings.state_dtype == StateDtype::Bfloat16 {
            return adamw_bf16::step(params, master_weights, &gradients, exp_avg, exp_avg_sq, noise);
        }
        libtorch::fused_adamw(params, &master_weights, &gradients, &exp_avg, &exp_avg_sq)?;
        if self.weights.kind() != Kind::Float {
            slice(&self.group.shard(self.weights.buffer())).f_copy_(&master_weights)?;
        }
        Ok(())
    }

    pub fn gradients(&self) -> &Gradients {
        &self.gradients
    }

    /// Counts the skipped steps. Waits for the device.
    pub fn skipped_steps(&self) -> SkippedSteps {
        let read = |count: &Tensor| count.double_value(&[]) as usize;
        SkippedSteps { total: read(&self.num_skipped), in_a_row: read(&self.num_skipped_in_a_row) }
    }

    /// Whether every weight is a finite number. Waits for the device.
    pub fn is_finite(&self) -> bool {
        let _no_grad = tch::no_grad_guard();
        let (min, max) = self.weights.buffer().aminmax(None, false);
        // One number, so that the device is waited for once.
        min.isfinite().logical_and(&max.isfinite()).int64_value(&[]) != 0
    }

    /// Runs `body` while the model has the average of its weights, if one is kept. Afterwards the
    /// model has its own weights again, even if `body` failed. Every process must call it.
    ///
    /// # Errors
    /// Those of the body, libtorch's, a process that has died.
    pub fn with_average<T>(&self, body: impl FnOnce() -> Result<T>) -> Result<T> {
        let Some(ema) = &self.ema else { return body() };
        let own_weights =
            if self.masters_are_weights() { self.master_weights.copy() } else { self.master_weights.shallow_clone() };
        let result = self.replace_weights(&ema.average).and_then(|()| body());
        self.replace_weights(&own_weights)?;
        result
    }

    /// Gives the model other weights, of which `shard` is this process's shard.
    fn replace_weights(&self, shard: &Tensor) -> Result<()> {
        tch::no_grad(|| self.group.shard(self.weights.buffer()).f_copy_(shard))?;
        self.group.all_gather(self.weights.buffer())
    }

    /// Whether the master weights are the model's own, not a copy.
    fn masters_are_weights(&self) -> bool {
        self.master_weights.kind() == self.weights.kind()
    }

    /// Whether the model that a checkpoint gets has the master weights too, bit for bit.
    pub fn masters_are_saved_weights(&self) -> bool {
        self.masters_are_weights() && self.ema.is_none()
    }

    /// The layout that the shards of all processes have together.
    pub fn layout(&self) -> &ParamBuffer {
        &self.weights
    }

    /// The elements of that layout which this process's shards hold.
    pub fn shard_elements(&self) -> Range<i64> {
        let num_elements = self.master_weights.size()[0];
        let start = self.group.rank() as i64 * num_elements;
        start..start + num_elements
    }

    /// This process's shards of everything that a checkpoint needs, by name.
    pub fn shards(&self) -> Vec<(&'static str, &Tensor)> {
        let shards =
            [(MASTER_WEIGHTS, &self.master_weights), ("exp_avg", &self.exp_avg), ("exp_avg_sq", &self.exp_avg_sq)];
        shards.into_iter().chain(self.ema.iter().map(|ema| ("ema", &ema.average))).collect()
    }

    /// Takes over a state whose shards were read from a checkpoint, and gives the model its weights.
    /// `num_skipped` is the number of steps skipped before the checkpoint. Every process must call
    /// it.
    ///
    /// # Errors
    /// libtorch's errors, a process that has died.
    pub fn finish_restore(&mut self, num_skipped: usize) -> Result<()> {
        self.replace_weights(&self.master_weights)?;
        let _ = self.num_skipped.fill_(num_skipped as f64);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use cllm_core::model::ModelConfig;
    use serde_json::json;
    use tch::Device;

    use super::*;

    fn tiny_model(size: i64, kind: Kind) -> Transformer {
        let config = ModelConfig::from_json(&json!({
            "model_type": "llama", "vocab_size": size, "hidden_size": size, "intermediate_size": size, "num_hidden_layers": 1,
            "num_attention_heads": 1, "tie_word_embeddings": true,
        }));
        Transformer::random(config.unwrap(), 1, Device::Cpu, kind)
    }

    fn new_state(model: &Transformer, optimizer: OptimizerSettings, seed: u64) -> Result<OptimizerState> {
        let settings = Settings { optimizer, seed, ..Settings::plain() };
        OptimizerState::new(model, &settings, Rc::new(ProcessGroup::single()))
    }

    fn all_gradients(state: &OptimizerState) -> &ParamBuffer {
        match &state.gradients {
            Gradients::Whole { own, .. } => own,
            Gradients::Sharded(_) => panic!("a single process has all gradients"),
        }
    }

    /// A tiny model after a step in which every gradient is `gradient`, and the norm of that
    /// gradient.
    fn after_a_step(gradient: f64, max_grad_norm: Option<f64>) -> (OptimizerState, f64) {
        let settings = OptimizerSettings { max_grad_norm, ..Settings::plain().optimizer };
        let model = tiny_model(4, Kind::Float);
        let mut state = new_state(&model, settings, 0).unwrap();
        for (_, mut tensor) in all_gradients(&state).tensors() {
            let _ = tensor.fill_(gradient);
        }
        let norm = state.step(0.1, 1).unwrap();
        (state, norm.double_value(&[]))
    }

    #[test]
    fn numbers_of_processes_that_divide_the_weights_are_proposed() {
        let weights = 8 * 5040 * 16;
        assert!([1, 2, 3, 8, 10, 128].iter().all(|world_size| check_divides(weights, *world_size).is_ok()));
        for (world_size, advice) in [(11, "among 11 processes: start 10 or 12"), (17, "start 16 or 18")] {
            let error = check_divides(weights, world_size).unwrap_err().to_string();
            assert!(error.contains(advice), "{error}");
        }
    }

    #[test]
    fn gradients_are_clipped_only_above_the_maximum_norm() {
        let applied = |gradient: f64, max_grad_norm: Option<f64>| {
            let (state, norm) = after_a_step(gradient, max_grad_norm);
            (state.exp_avg.double_value(&[0]) / 0.1, norm)
        };
        let (plain, norm) = applied(2.0, None);
        assert!((plain - 2.0).abs() < 1e-6 && norm > 4.0, "{plain} {norm}");
        let (clipped, same_norm) = applied(2.0, Some(1.0));
        assert!((clipped - 2.0 / norm).abs() < 1e-6 && same_norm == norm, "{clipped} {same_norm}");
        assert_eq!(applied(2.0, Some(1e3)).0, plain);
    }

    /// A change of a thousandth is less than half the spacing of bfloat16 at 1: rounded to the
    /// nearest, no weight would move.
    #[test]
    fn a_bf16_state_moves_as_a_float32_one_does() {
        let mean_after = |state_dtype: StateDtype| {
            let model = tiny_model(64, Kind::BFloat16);
            let _no_grad = tch::no_grad_guard();
            let _ = model.weights().buffer().shallow_clone().fill_(1.0);
            let settings = OptimizerSettings { weight_decay: 0.1, state_dtype, ..Settings::plain().optimizer };
            let mut state = new_state(&model, settings, 3).unwrap();
            for number in 1..=50 {
                let _ = all_gradients(&state).buffer().shallow_clone().fill_(if number <= 25 { 1e-3 } else { 2e-3 });
                let _ = state.step(1e-3, number).unwrap();
            }
            let _ = all_gradients(&state).buffer().shallow_clone().fill_(f64::NAN);
            let before = state.weights.buffer().copy();
            let _ = state.step(1e-3, 51).unwrap();
            assert_eq!(before, *state.weights.buffer(), "a skipped step changes nothing");
            let mean = |start: i64, length: i64| before.narrow(0, start, length).mean(Kind::Float).double_value(&[]);
            let num_in_matrices = state.weights.num_matrix_elements();
            [mean(0, num_in_matrices), mean(num_in_matrices, before.numel() as i64 - num_in_matrices)]
        };
        let (exact, rounded) = (mean_after(StateDtype::Float32), mean_after(StateDtype::Bfloat16));
        assert!(exact.iter().all(|mean| *mean < 0.97));
        for (exact, rounded) in exact.iter().zip(rounded) {
            assert!((exact - rounded).abs() < 3e-3, "{exact} {rounded}");
        }
        assert_eq!(rounded, mean_after(StateDtype::Bfloat16), "the same seed rounds the same way");
    }

    #[test]
    fn skipped_steps_are_counted_in_total_and_in_a_row() {
        let (mut state, _) = after_a_step(f64::NAN, Some(1.0));
        assert_eq!(state.skipped_steps(), SkippedSteps { total: 1, in_a_row: 1 });
        let _ = state.step(0.1, 2).unwrap();
        assert_eq!(state.skipped_steps(), SkippedSteps { total: 1, in_a_row: 0 });
    }

    #[test]
    fn the_model_has_its_own_weights_again_after_a_body_that_fails() {
        let settings = OptimizerSettings { ema_decay: Some(0.9), ..Settings::plain().optimizer };
        let model = tiny_model(4, Kind::Float);
        let state = new_state(&model, settings, 0).unwrap();
        let _ = tch::no_grad(|| model.weights().buffer().shallow_clone().fill_(3.0));
        let own_weights = model.weights().buffer().copy();
        let failed = state.with_average(|| {
            assert_ne!(own_weights, *model.weights().buffer(), "the model has the average in the meantime");
            Err::<(), _>(Error::usage("no"))
        });
        assert_eq!(failed.unwrap_err().to_string(), "no");
        assert_eq!(own_weights, *model.weights().buffer());
    }
}
