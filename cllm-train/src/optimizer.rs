//! AdamW over flat buffers, and its schedule.

use std::ops::Range;
use std::rc::Rc;

use cllm_core::cuda::libtorch::{self, AdamW};
use cllm_core::distributed::ProcessGroup;
use cllm_core::model::{ParamBuffer, Transformer};
use cllm_core::{Error, Result, fingerprint};
use tch::{Device, Kind, Tensor};

use crate::ema;
use crate::settings::{OptimizerSettings, StateDtype};

/// Elements that are updated at once: temporaries are of this size.
pub const PIECE: i64 = 1 << 26;

/// Weights, their gradients and the optimizer's state. Of several processes each holds all weights and gradients, and the state
/// of its part of them (ZeRO stage 1; Rajbhandari et al., arXiv 1910.02054).
pub struct State {
    group: Rc<ProcessGroup>,
    weights: ParamBuffer,
    gradients: ParamBuffer,
    /// What is updated, `[part]` as all below. In float32 and with a bf16 state it lies in the weights themselves.
    masters: Tensor,
    first: Tensor,
    second: Tensor,
    /// The moving average of the weights, float32, and its decay.
    average: Option<(Tensor, f64)>,
    seed: u64,
    /// Skipped steps, counted on the device in float32: in all, and in a row.
    skipped: Tensor,
    skipped_in_a_row: Tensor,
}

/// What an update needs besides the tensors.
struct Update<'u> {
    settings: &'u OptimizerSettings,
    lr: f64,
    /// Number of the step, from 1.
    number: usize,
    /// What the gradients are divided by, and 1 where nothing may change (else 0): float32 scalars on the device.
    scale: Tensor,
    skip: Tensor,
}

impl State {
    /// Fresh state for what is trainable of a model, which from now on collects gradients. `seed`: of the rounding of a bf16
    /// state.
    ///
    /// # Errors
    /// [`Error::Usage`] for a bf16 state of other weights or a number of processes that the weights cannot be shared among;
    /// [`Error::Torch`], such as memory that ran out.
    pub fn new(model: &Transformer, settings: &OptimizerSettings, seed: u64, group: Rc<ProcessGroup>) -> Result<Self> {
        let _no_grad = tch::no_grad_guard();
        let bf16 = settings.state_dtype == StateDtype::Bfloat16;
        if bf16 && model.kind() != Kind::BFloat16 {
            return Err(Error::usage(
                "optimizer.state_dtype=bfloat16 is for weights in bf16, as on a GPU: on the CPU they are float32",
            ));
        }
        let weights = model.trainable().shallow_clone();
        if !weights.buffer().numel().is_multiple_of(8 * group.world_size()) {
            return Err(Error::usage(format!("{} processes cannot share the weights evenly", group.world_size())));
        }
        let kind = if bf16 { Kind::BFloat16 } else { Kind::Float };
        // The same tensor where the type is the same already.
        let masters = group.shard(weights.buffer()).to_kind(kind);
        let zero = || Tensor::zeros([], (Kind::Float, model.device()));
        Ok(State {
            gradients: model.collect_gradients()?,
            first: masters.f_zeros_like()?,
            second: masters.f_zeros_like()?,
            average: settings.ema_decay.map(|decay| (masters.to_kind(Kind::Float).copy(), decay)),
            masters,
            weights,
            group,
            seed,
            skipped: zero(),
            skipped_in_a_row: zero(),
        })
    }

    /// One step from the gradients that all processes collected, which are cleared. Returns the norm before clipping, on the
    /// device: nothing here waits for it. A step whose norm is not finite changes nothing, and is counted.
    ///
    /// # Errors
    /// libtorch's errors, a process that is gone.
    pub fn step(&mut self, settings: &OptimizerSettings, lr: f64, number: usize) -> Result<Tensor> {
        let _no_grad = tch::no_grad_guard();
        let gradients = self.group.reduce_scatter(self.gradients.buffer())?;
        let squares = gradients.f_norm_scalaropt_dtype(2, Kind::Float)?.square();
        self.group.all_reduce(&squares)?;
        let norm = squares.sqrt();
        let scale = settings.max_grad_norm.map_or_else(|| Tensor::ones_like(&norm), |max| (&norm / max).clamp_min(1.0));
        let skip = norm.isfinite().logical_not().to_kind(Kind::Float);
        let update = Update { settings, lr, number, scale, skip };
        if settings.state_dtype == StateDtype::Bfloat16 {
            tch::manual_seed(fingerprint::derive_seed(self.seed, &number.to_string()) as i64);
        }
        let count = self.masters.numel() as i64;
        let matrices = (self.weights.num_matrix_elements() - self.group.rank() as i64 * count).clamp(0, count);
        for (range, weight_decay) in [(0..matrices, settings.weight_decay), (matrices..count, 0.0)] {
            for start in range.clone().step_by(PIECE as usize) {
                self.update(&update, &gradients, start..range.end.min(start + PIECE), weight_decay)?;
            }
        }
        self.group.all_gather(self.weights.buffer())?;
        if let Some((average, decay)) = &self.average {
            ema::update(average, &self.masters, *decay, number)?;
        }
        // Only now: in float32 the gradients above are the collected ones.
        let _ = self.gradients.buffer().shallow_clone().zero_();
        self.skipped += &update.skip;
        self.skipped_in_a_row = (&self.skipped_in_a_row + 1.0) * &update.skip;
        Ok(norm)
    }

    /// Steps that were skipped: in all, and in a row up to the last. Waits for the device.
    pub fn skipped(&self) -> (usize, usize) {
        let read = |count: &Tensor| count.double_value(&[]) as usize;
        (read(&self.skipped), read(&self.skipped_in_a_row))
    }

    /// Whether every weight is a finite number. Waits for the device.
    pub fn is_finite(&self) -> bool {
        let _no_grad = tch::no_grad_guard();
        let (least, most) = self.weights.buffer().aminmax(None, false);
        least.double_value(&[]).is_finite() && most.double_value(&[]).is_finite()
    }

    fn update(&self, update: &Update<'_>, gradients: &Tensor, piece: Range<i64>, weight_decay: f64) -> Result<()> {
        let of = |part: &Tensor| part.narrow(0, piece.start, piece.end - piece.start);
        let (masters, first, second) = (of(&self.masters), of(&self.first), of(&self.second));
        let gradients = of(gradients).to_kind(Kind::Float);
        let Update { settings, lr, number, scale, skip } = update;
        let numbers = AdamW {
            lr: *lr,
            beta1: settings.beta1,
            beta2: settings.beta2,
            weight_decay,
            eps: settings.eps,
            number: *number,
            scale,
            skip,
        };
        if settings.state_dtype == StateDtype::Bfloat16 {
            return adamw_bf16(&numbers, masters, &gradients, first, second);
        }
        libtorch::fused_adamw(&numbers, &masters, &gradients, &first, &second)?;
        if self.weights.kind() != Kind::Float {
            of(&self.group.shard(self.weights.buffer())).f_copy_(&masters)?;
        }
        Ok(())
    }

    /// Runs `body` while the model has the average of its weights, where there is one; then it has its own again. Every process
    /// calls it.
    ///
    /// # Errors
    /// The body's own, libtorch's, a process that is gone.
    pub fn with_average<T>(&self, body: impl FnOnce() -> Result<T>) -> Result<T> {
        let Some((average, _)) = &self.average else { return body() };
        let mut weights = self.weights.buffer().shallow_clone();
        let own = weights.detach().copy();
        tch::no_grad(|| self.group.shard(&weights).f_copy_(average))?;
        self.group.all_gather(&weights)?;
        let result = body();
        tch::no_grad(|| weights.f_copy_(&own))?;
        result
    }

    fn parts(&self) -> Vec<(&'static str, &Tensor)> {
        let parts = [("master", &self.masters), ("first", &self.first), ("second", &self.second)];
        parts.into_iter().chain(self.average.iter().map(|(average, _)| ("ema", average))).collect()
    }

    /// Every tensor of the state under a name, for a checkpoint, whole on the process that writes. Every process calls it.
    ///
    /// # Errors
    /// A process that is gone; memory that ran out.
    pub fn tensors(&self) -> Result<Vec<(String, Tensor)>> {
        let mut all = Vec::new();
        for (prefix, part) in self.parts() {
            let Some(buffer) = self.gathered(part)? else { continue };
            let whole = self.weights.with_buffer(buffer);
            all.extend(whole.tensors().into_iter().map(|(name, tensor)| (format!("{prefix}.{name}"), tensor)));
        }
        Ok(all)
    }

    /// The parts of all processes, one behind another, for the one that writes: on the host, where there are others.
    fn gathered(&self, part: &Tensor) -> Result<Option<Tensor>> {
        let _no_grad = tch::no_grad_guard();
        if self.group.world_size() == 1 {
            return Ok(Some(part.shallow_clone()));
        }
        let mut parts = Vec::new();
        for rank in 0..self.group.world_size() {
            let passed = if rank == self.group.rank() { part.copy() } else { part.f_empty_like()? };
            self.group.broadcast_tensor(&passed, rank)?;
            if self.group.is_main() {
                parts.push(passed.f_to(Device::Cpu)?);
            }
        }
        Ok(if parts.is_empty() { None } else { Some(Tensor::f_cat(&parts, 0)?) })
    }

    /// Takes the state of a checkpoint, the weights and their average included, and the number of steps skipped before it. Every
    /// process calls it.
    ///
    /// # Errors
    /// [`Error::Usage`] when a tensor is missing or of another shape.
    pub fn restore(&mut self, skipped: usize, mut find: impl FnMut(&str, &Tensor) -> Option<Tensor>) -> Result<()> {
        let _no_grad = tch::no_grad_guard();
        for (prefix, part) in self.parts() {
            let buffer = Tensor::f_zeros(self.weights.buffer().size(), (part.kind(), Device::Cpu))?;
            let whole = self.weights.with_buffer(buffer);
            for (name, mut tensor) in whole.tensors() {
                let name = format!("{prefix}.{name}");
                let saved = find(&name, &tensor)
                    .ok_or_else(|| Error::usage(format!("the checkpoint's optimizer state lacks `{name}`")))?;
                tensor.f_copy_(&saved)?;
            }
            part.shallow_clone().f_copy_(&self.group.shard(whole.buffer()))?;
        }
        self.group.shard(self.weights.buffer()).f_copy_(&self.masters)?;
        self.group.all_gather(self.weights.buffer())?;
        let _ = self.skipped.fill_(skipped as f64);
        Ok(())
    }
}

/// AdamW without float32 copies of anything: weights and moments are bf16, computed in float32 and rounded up or down at
/// random, in proportion, so that changes too small for bf16 still add up (Gupta et al., arXiv 1502.02551).
fn adamw_bf16(
    numbers: &AdamW<'_>,
    mut weights: Tensor,
    gradients: &Tensor,
    mut first: Tensor,
    mut second: Tensor,
) -> Result<()> {
    let AdamW { lr, beta1, beta2, weight_decay, eps, number, scale, skip } = *numbers;
    let gradients = gradients / scale;
    let moment = |old: &Tensor, beta: f64, new: &Tensor| old.to_kind(Kind::Float) * beta + new * (1.0 - beta);
    let (mean, square) = (moment(&first, beta1, &gradients), moment(&second, beta2, &gradients.square()));
    let unbiased = |beta: f64| 1.0 - beta.powi(number as i32);
    let deviation = (&square / unbiased(beta2)).sqrt() + eps;
    let changed =
        weights.to_kind(Kind::Float) * (1.0 - lr * weight_decay) - (&mean / deviation) * (lr / unbiased(beta1));
    let stays = skip.to_kind(Kind::Bool);
    for (tensor, new) in [(&mut first, mean), (&mut second, square), (&mut weights, changed)] {
        tensor.f_copy_(&tensor.where_self(&stays, &round_at_random(&new).to_kind(Kind::BFloat16)))?;
    }
    Ok(())
}

/// Float32 numbers that bf16 holds: each of the two around a number with a chance in proportion to its nearness.
fn round_at_random(x: &Tensor) -> Tensor {
    let noise = Tensor::randint(1 << 16, x.size(), (Kind::Int, x.device()));
    (x.view_dtype(Kind::Int) + noise).bitwise_and(-(1i64 << 16)).view_dtype(Kind::Float)
}

/// The learning rate of step `number` (from 1) of `total`: a linear rise, then half a cosine down.
pub fn learning_rate(settings: &OptimizerSettings, number: usize, total: usize) -> f64 {
    let warmup = (settings.warmup_fraction * total as f64).ceil();
    let number = number as f64;
    if number <= warmup {
        return settings.lr * number / warmup;
    }
    let done = ((number - warmup) / (total as f64 - warmup).max(1.0)).min(1.0);
    let cosine = 0.5 * (1.0 + (std::f64::consts::PI * done).cos());
    settings.lr * (settings.min_lr_fraction + (1.0 - settings.min_lr_fraction) * cosine)
}

#[cfg(test)]
mod tests {
    use cllm_core::model::ModelConfig;

    use super::*;

    /// A tiny model after a step whose gradient is `gradient` everywhere.
    fn after_a_step(gradient: f64, max_grad_norm: Option<f64>) -> (State, f64) {
        let config = serde_json::json!({
            "model_type": "llama", "vocab_size": 4, "hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1,
            "num_attention_heads": 1, "tie_word_embeddings": true,
        });
        let config = ModelConfig::from_json(&config).unwrap();
        let model = Transformer::random(config, 1, Device::Cpu, Kind::Float);
        let mut state = State::new(&model, &OptimizerSettings::default(), 0, Rc::new(ProcessGroup::single())).unwrap();
        for (_, mut tensor) in state.gradients.tensors() {
            let _ = tensor.fill_(gradient);
        }
        let norm = state.step(&OptimizerSettings { max_grad_norm, ..OptimizerSettings::default() }, 0.1, 1).unwrap();
        (state, norm.double_value(&[]))
    }

    #[test]
    fn a_gradient_is_clipped_to_the_norm_and_a_short_one_is_left() {
        let moment = |gradient: f64, max_grad_norm: Option<f64>| {
            let (state, norm) = after_a_step(gradient, max_grad_norm);
            (state.first.double_value(&[0]) / 0.1, norm)
        };
        let (plain, norm) = moment(2.0, None);
        assert!((plain - 2.0).abs() < 1e-6 && norm > 4.0, "{plain} {norm}");
        let (clipped, same) = moment(2.0, Some(1.0));
        assert!((clipped - 2.0 / norm).abs() < 1e-6 && same == norm, "{clipped} {same}");
        assert_eq!(moment(2.0, Some(1e3)).0, plain);
    }

    /// A change of a thousandth is less than half of what bf16 tells apart at 1: rounded to the nearest, nothing would move.
    #[test]
    fn a_bf16_state_moves_as_a_float32_one_does() {
        let config = serde_json::json!({
            "model_type": "llama", "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1,
            "num_attention_heads": 1, "tie_word_embeddings": true,
        });
        let mean_after = |precision: StateDtype| {
            let config = ModelConfig::from_json(&config).unwrap();
            let model = Transformer::random(config, 1, Device::Cpu, Kind::BFloat16);
            let _no_grad = tch::no_grad_guard();
            let _ = model.weights().buffer().shallow_clone().fill_(1.0);
            let settings =
                OptimizerSettings { weight_decay: 0.1, state_dtype: precision, ..OptimizerSettings::default() };
            let mut state = State::new(&model, &settings, 3, Rc::new(ProcessGroup::single())).unwrap();
            for number in 1..=50 {
                let _ = state.gradients.buffer().shallow_clone().fill_(if number <= 25 { 1e-3 } else { 2e-3 });
                let _ = state.step(&settings, 1e-3, number).unwrap();
            }
            let _ = state.gradients.buffer().shallow_clone().fill_(f64::NAN);
            let before = state.weights.buffer().copy();
            let _ = state.step(&settings, 1e-3, 51).unwrap();
            assert_eq!(before, *state.weights.buffer(), "a step that is skipped changes nothing");
            let part = |start: i64, length: i64| before.narrow(0, start, length).mean(Kind::Float).double_value(&[]);
            let matrices = state.weights.num_matrix_elements();
            [part(0, matrices), part(matrices, before.numel() as i64 - matrices)]
        };
        let (exact, rounded) = (mean_after(StateDtype::Float32), mean_after(StateDtype::Bfloat16));
        assert!(exact.iter().all(|mean| *mean < 0.97));
        for (exact, rounded) in exact.iter().zip(rounded) {
            assert!((exact - rounded).abs() < 3e-3, "{exact} {rounded}");
        }
        let (first, again) = (rounded, mean_after(StateDtype::Bfloat16));
        assert_eq!(first, again);
    }

    #[test]
    fn skipped_steps_are_counted_in_all_and_in_a_row() {
        let (mut state, _) = after_a_step(f64::NAN, Some(1.0));
        assert_eq!(state.skipped(), (1, 1));
        let _ = state.step(&OptimizerSettings::default(), 0.1, 2).unwrap();
        assert_eq!(state.skipped(), (1, 0));
    }

    #[test]
    fn the_rate_rises_then_falls_to_its_floor() {
        let settings =
            OptimizerSettings { lr: 1.0, warmup_fraction: 0.1, min_lr_fraction: 0.1, ..OptimizerSettings::default() };
        let rates: Vec<f64> = (1..=100).map(|number| learning_rate(&settings, number, 100)).collect();
        assert_eq!((rates[0], rates[9]), (0.1, 1.0));
        assert!(rates[10..].windows(2).all(|pair| pair[1] < pair[0]));
        assert!((rates[99] - 0.1).abs() < 1e-9);
    }
}
