//! The kernels of a training step (csrc/train.cu), compiled for one model's shape.

use tch::{Kind, Tensor};

use super::nvrtc::{Argument, Kernel, Module};
use super::shape::KernelShape;
use crate::Result;
use Argument::{Data, Float, Int, MaybeData};

const SOURCE: &str = concat!(include_str!("../../csrc/bf16.cuh"), include_str!("../../csrc/train.cu"));
/// Threads of a block where each takes 8 neighbouring values.
const THREADS: usize = 256;
/// Blocks that share the rows of a norm's backward: two for each multiprocessor of an H100.
const NORM_BLOCKS: usize = 264;
/// Threads of a row of logits.
const LOGITS_THREADS: usize = 512;

/// Kernels of one shape on one device. Tensors are contiguous, bf16 unless said; `T` tokens.
pub struct TrainKernels {
    shape: KernelShape,
    norm: Kernel,
    norm_backward: Kernel,
    gate: Kernel,
    gate_backward: Kernel,
    rotate: Kernel,
    log_sum: Kernel,
    divergence: Kernel,
    cross_entropy: Kernel,
}

/// Logits of some rows `[rows, vocab]`, and the logarithms of the sums of their exponentials, float32 `[rows]`.
pub struct Logits {
    /// The logits; those of a student become their own gradient.
    pub values: Tensor,
    log_sums: Tensor,
}

impl TrainKernels {
    /// Whether the kernels can compute it: they take 8 values at a time, a row of the residual stream in a block.
    pub fn supports(shape: &KernelShape) -> bool {
        let sizes = [shape.hidden, shape.ffn, shape.vocab];
        sizes.iter().all(|size| size.is_multiple_of(8))
            && shape.hidden <= 8192
            && [64, 128].contains(&shape.head_dim)
            && !shape.query_key_norm
    }

    /// Compiles and loads them.
    ///
    /// # Errors
    /// [`crate::Error::Torch`] with the words of the compiler or the driver.
    pub fn new(device: usize, shape: KernelShape) -> Result<Self> {
        let module = Module::compiled(device, SOURCE, &shape.macros())?;
        let named = |name: &str| module.kernel(name, 0, false);
        Ok(TrainKernels {
            norm: named("rms_norm")?,
            norm_backward: named("rms_norm_backward")?,
            gate: named("gate")?,
            gate_backward: named("gate_backward")?,
            rotate: named("rotate")?,
            log_sum: named("log_sum")?,
            divergence: named("divergence")?,
            cross_entropy: named("cross_entropy")?,
            shape,
        })
    }

    /// RMS norm of `x [T, hidden]`.
    ///
    /// # Errors
    /// [`crate::Error::Torch`], here and below.
    pub fn rms_norm(&self, x: &Tensor, weight: &Tensor) -> Result<Tensor> {
        let out = x.f_empty_like()?;
        // SAFETY: as declared in the source; a row of x is HIDDEN wide.
        unsafe { self.norm.launch([self.rows(x), 1], self.norm_threads(), &[Data(x), Data(weight), Data(&out)])? };
        Ok(out)
    }

    /// Adds to `d_residual [T, hidden]` what follows from `d_out` for the input `x` of a norm; the weight's gradient, float32
    /// `[hidden]`, is returned.
    pub fn rms_norm_backward(
        &self,
        x: &Tensor,
        weight: &Tensor,
        d_out: &Tensor,
        d_residual: &Tensor,
    ) -> Result<Tensor> {
        let rows = self.rows(x);
        assert!(self.rows(d_out) == rows && self.rows(d_residual) == rows);
        let blocks = NORM_BLOCKS.min(rows);
        let parts = Tensor::f_empty([blocks as i64, self.shape.hidden as i64], (Kind::Float, x.device()))?;
        let tensors = [x, weight, d_out, d_residual, d_residual, &parts].map(Data);
        let arguments = [&tensors[..], &[Int(rows as i32)]].concat();
        // SAFETY: as declared in the source, sizes just checked.
        unsafe { self.norm_backward.launch([blocks, 1], self.norm_threads(), &arguments)? };
        Ok(parts.f_sum_dim_intlist(0, false, Kind::Float)?)
    }

    /// `silu(gate) * up [T, ffn]` of `[T, 2 ffn]`.
    pub fn swiglu(&self, gate_up: &Tensor) -> Result<Tensor> {
        let tokens = gate_up.size()[0];
        assert_eq!(gate_up.numel(), tokens as usize * 2 * self.shape.ffn);
        let inner = Tensor::f_empty([tokens, self.shape.ffn as i64], (Kind::BFloat16, gate_up.device()))?;
        let arguments = [Data(gate_up), Data(&inner), Int(tokens as i32)];
        // SAFETY: as declared in the source, sizes just checked.
        unsafe { self.gate.launch([(inner.numel() / 8).div_ceil(THREADS), 1], THREADS, &arguments)? };
        Ok(inner)
    }

    /// In place: `gate_up [T, 2 ffn]` becomes its gradient, and `d_inner [T, ffn]`, the gradient of the result, the result.
    pub fn swiglu_backward(&self, gate_up: &Tensor, d_inner: &Tensor) -> Result<()> {
        let tokens = gate_up.size()[0];
        assert_eq!((gate_up.numel(), d_inner.numel() * 2), (tokens as usize * 2 * self.shape.ffn, gate_up.numel()));
        let arguments = [Data(gate_up), Data(d_inner), Int(tokens as i32)];
        // SAFETY: as declared in the source, sizes just checked.
        unsafe { self.gate_backward.launch([(d_inner.numel() / 8).div_ceil(THREADS), 1], THREADS, &arguments) }
    }

    /// Rotates the queries and keys of `qkv [T, (heads + 2 kv_heads) head_dim]` in place by angles whose cosines and sines,
    /// float32 `[T, head_dim / 2]`, are given; or back.
    pub fn rotate(&self, qkv: &Tensor, (cos, sin): (&Tensor, &Tensor), back: bool) -> Result<()> {
        let KernelShape { heads, kv_heads, head_dim, .. } = self.shape;
        let tokens = qkv.size()[0] as usize;
        assert_eq!(qkv.numel(), tokens * (heads + 2 * kv_heads) * head_dim);
        assert!([cos, sin].iter().all(|angles| angles.numel() == tokens * head_dim / 2));
        let sign = if back { -1.0 } else { 1.0 };
        let arguments = [Data(qkv), Data(cos), Data(sin), Float(sign), Int(tokens as i32)];
        let work = tokens * (heads + kv_heads) * head_dim / 16;
        // SAFETY: as declared in the source, sizes just checked.
        unsafe { self.rotate.launch([work.div_ceil(THREADS), 1], THREADS, &arguments) }
    }

    /// Logits `[rows, vocab]` with what their distributions need.
    pub fn logits(&self, values: Tensor) -> Result<Logits> {
        let rows = values.numel() / self.shape.vocab;
        let log_sums = Tensor::f_empty([rows as i64], (Kind::Float, values.device()))?;
        // SAFETY: as declared in the source; a row is VOCAB wide.
        unsafe { self.log_sum.launch([rows, 1], LOGITS_THREADS, &[Data(&values), Data(&log_sums)])? };
        Ok(Logits { values, log_sums })
    }

    /// The divergence of each of `count` rows of a student from `first` on from the target's row of `target_rows` (int64
    /// `[count]`): float32 `[count]`. The student's logits become the gradient, times `scale`. `kind`: 0 for KL(target ||
    /// student), 1 for KL(student || target), 2 for Jensen-Shannon. Targets may be other rows of the same logits.
    pub fn divergence(
        &self,
        student: &Logits,
        (first, count): (i64, i64),
        target: &Logits,
        target_rows: &Tensor,
        kind: i32,
        scale: f64,
    ) -> Result<Tensor> {
        assert_eq!(target_rows.numel() as i64, count);
        let out = Tensor::f_empty([count], (Kind::Float, target_rows.device()))?;
        let own = [student.values.f_narrow(0, first, count)?, student.log_sums.f_narrow(0, first, count)?];
        let tensors = [&own[0], &own[1], &target.values, &target.log_sums, target_rows].map(Data);
        let arguments = [&tensors[..], &[Int(kind), Float(scale as f32), Data(&out)]].concat();
        // SAFETY: as declared in the source; whoever made the rows keeps them within the target's.
        unsafe { self.divergence.launch([count as usize, 1], LOGITS_THREADS, &arguments)? };
        Ok(out)
    }

    /// Cross-entropy of `labels` (int64 `[count]`, negative for none) with as many leading rows of a student, and with a teacher's logits of the
    /// same rows also KL(teacher || student): float32 `[count]` each. The student's logits become the gradient of both, each
    /// times its scale.
    pub fn cross_entropy(
        &self,
        student: &Logits,
        labels: &Tensor,
        scale: f64,
        teacher: Option<(&Logits, f64)>,
    ) -> Result<(Tensor, Option<Tensor>)> {
        let count = labels.numel() as i64;
        let empty = || Tensor::f_empty([count], (Kind::Float, labels.device()));
        let (out, teacher_out) = (empty()?, teacher.is_some().then(empty).transpose()?);
        let rows = |logits: &Logits| assert!(logits.log_sums.numel() as i64 >= count);
        rows(student);
        teacher.iter().for_each(|(teacher, _)| rows(teacher));
        let arguments = [
            Data(&student.values),
            Data(&student.log_sums),
            Data(labels),
            Float(scale as f32),
            MaybeData(teacher.map(|(teacher, _)| &teacher.values)),
            MaybeData(teacher.map(|(teacher, _)| &teacher.log_sums)),
            Float(teacher.map_or(0.0, |(_, scale)| scale) as f32),
            Data(&out),
            MaybeData(teacher_out.as_ref()),
        ];
        // SAFETY: as declared in the source, sizes just checked; labels are ids of the vocabulary or negative.
        unsafe { self.cross_entropy.launch([count as usize, 1], LOGITS_THREADS, &arguments)? };
        Ok((out, teacher_out))
    }

    fn rows(&self, x: &Tensor) -> usize {
        assert!(x.numel().is_multiple_of(self.shape.hidden));
        x.numel() / self.shape.hidden
    }

    fn norm_threads(&self) -> usize {
        (self.shape.hidden / 8).next_multiple_of(32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::nvrtc::compile;

    #[test]
    fn the_kernels_compile_without_a_gpu() {
        let small = KernelShape {
            hidden: 576,
            heads: 9,
            kv_heads: 3,
            head_dim: 64,
            ffn: 1536,
            vocab: 49152,
            eps: 1e-5,
            query_key_norm: false,
        };
        let large =
            KernelShape { hidden: 4096, heads: 32, kv_heads: 8, head_dim: 128, ffn: 11008, vocab: 32000, ..small };
        for shape in [small, large] {
            assert!(TrainKernels::supports(&shape));
            assert!(compile(SOURCE, (9, 0), &shape.macros()).unwrap().starts_with(b"\x7fELF"));
        }
        assert!(!TrainKernels::supports(&KernelShape { head_dim: 96, ..small }));
    }
}
