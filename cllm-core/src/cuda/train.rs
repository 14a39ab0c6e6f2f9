//! The kernels of a training step (csrc/train.cu), compiled for one model's shape.

use tch::{Device, Kind, Tensor};

use super::launch::{self, Argument, Kernel, Param, Signature, aligned, count, float, float32, int, int64, nullable};
use super::nvrtc::{Macros, Module};
use super::shape::KernelShape;
use crate::device::upload;
use crate::{Error, Result};
use Argument::{Float, Int, Optional, Tensor as Data};

const SOURCE: &str = concat!(include_str!("../../csrc/bf16.cuh"), include_str!("../../csrc/train.cu"));
/// Threads of a block, unless a kernel needs more.
const THREADS: usize = 256;
/// Blocks that share the rows of a backward that sums over all of them: four for each
/// multiprocessor of an H100.
const MAX_SUMMING_BLOCKS: usize = 528;
/// Threads of a block that processes a row of logits.
const LOGITS_THREADS: usize = 512;
/// A thread processes chunks of this many neighbouring values.
const CHUNK: usize = 8;
/// A thread of a norm holds this many chunks of its row, and more only of rows that even 1024
/// threads cannot hold otherwise.
const CHUNKS_PER_THREAD: usize = 3;

/// A divergence between the distributions of a target and a student.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Divergence {
    /// KL(target || student).
    ForwardKl,
    /// KL(student || target).
    ReverseKl,
    JensenShannon,
    /// -log a, where the acceptance a is the sum of min(target, student).
    NegLogAcceptance,
    /// w KL(target || student) + (1 - w) (1 - a), where w is exp(-3 a) and counts as a constant.
    LkHybrid,
}

fn macros(shape: &KernelShape) -> Macros {
    let mut macros = shape.macros();
    let numbers = [
        ("ALIGNED", usize::from(shape.is_aligned())),
        ("QK_NORM", usize::from(shape.query_key_norm)),
        ("ROW_THREADS", row_threads(shape)),
        ("ROWS_PER_BLOCK", norm_threads(shape) / row_threads(shape)),
        ("HEAD_THREADS", head_threads(shape)),
        ("FORWARD_KL", Divergence::ForwardKl as usize),
        ("REVERSE_KL", Divergence::ReverseKl as usize),
        ("JENSEN_SHANNON", Divergence::JensenShannon as usize),
        ("NEG_LOG_ACCEPTANCE", Divergence::NegLogAcceptance as usize),
        ("LK_HYBRID", Divergence::LkHybrid as usize),
    ];
    macros.extend(numbers.map(|(name, number)| (name, number.to_string())));
    macros
}

/// The sizes that determine the shapes of the kernels' arguments. Sizes that a kernel does not use
/// are 0.
#[derive(Clone, Copy)]
struct Sizes {
    shape: KernelShape,
    /// Tokens, or rows of a student's logits.
    rows: usize,
    /// Rows of a target's logits.
    target_rows: usize,
}

/// Threads that share a row of a norm.
fn row_threads(shape: &KernelShape) -> usize {
    let chunks = shape.hidden.div_ceil(CHUNK);
    chunks.div_ceil(CHUNKS_PER_THREAD).next_power_of_two().clamp(32, 1024)
}

/// Threads of a block of a norm.
fn norm_threads(shape: &KernelShape) -> usize {
    row_threads(shape).max(THREADS)
}

fn num_norm_blocks(s: &Sizes) -> usize {
    (s.rows * row_threads(&s.shape)).div_ceil(norm_threads(&s.shape))
}

/// Threads that share a head of the queries or keys: each rotates a chunk of pairs.
fn head_threads(shape: &KernelShape) -> usize {
    (shape.head_dim / 2).div_ceil(CHUNK).next_power_of_two()
}

fn num_rotated_heads(s: &Sizes) -> usize {
    s.rows * (s.shape.heads + s.shape.kv_heads)
}

fn num_rotation_blocks(s: &Sizes) -> usize {
    (num_rotated_heads(s) * head_threads(&s.shape)).div_ceil(THREADS)
}

fn num_summing_blocks(num_blocks: usize) -> usize {
    num_blocks.min(MAX_SUMMING_BLOCKS)
}

/// bfloat16, as aligned as the tensors of a model of this shape are.
const fn bf16(name: &'static str, num_elements: fn(&Sizes) -> usize) -> Param<Sizes> {
    aligned(|s| if s.shape.is_aligned() { 16 } else { 2 }, launch::bf16(name, num_elements))
}

/// Distance between rows of logits.
fn pitch(sizes: &Sizes) -> usize {
    sizes.shape.vocab.next_multiple_of(CHUNK)
}

const X: Param<Sizes> = bf16("x", |s| s.rows * s.shape.hidden);
const WEIGHT: Param<Sizes> = bf16("weight", |s| s.shape.hidden);
const LOGITS: Param<Sizes> = launch::bf16("logits", |s| s.rows * pitch(s));
const LOGSUMEXPS: Param<Sizes> = float32("logsumexps", |s| s.rows);
const OUT: Param<Sizes> = float32("out", |s| s.rows);
const NUM_TOKENS: Param<Sizes> = count("tokens", |s| s.rows);
const NUM_ROWS: Param<Sizes> = count("rows", |s| s.rows);

const RMS_NORM: Signature<Sizes> = Signature {
    name: "rms_norm",
    grid: |s| [num_norm_blocks(s), 1],
    threads: |s| norm_threads(&s.shape),
    params: &[&[
        X,
        nullable(bf16("update", |s| s.rows * s.shape.hidden)),
        WEIGHT,
        bf16("out", |s| s.rows * s.shape.hidden),
        NUM_ROWS,
    ]],
};
const RMS_NORM_BACKWARD: Signature<Sizes> = Signature {
    name: "rms_norm_backward",
    grid: |s| [num_summing_blocks(num_norm_blocks(s)), 1],
    threads: |s| norm_threads(&s.shape),
    params: &[&[
        X,
        WEIGHT,
        bf16("d_out", |s| s.rows * s.shape.hidden),
        bf16("d_residual", |s| s.rows * s.shape.hidden),
        bf16("d_x", |s| s.rows * s.shape.hidden),
        float32("d_weight_partial", |s| num_summing_blocks(num_norm_blocks(s)) * s.shape.hidden),
        NUM_ROWS,
    ]],
};
const SWIGLU: Signature<Sizes> = Signature {
    name: "swiglu",
    grid: |s| [(s.rows * s.shape.ffn.div_ceil(CHUNK)).div_ceil(THREADS), 1],
    threads: |_| THREADS,
    params: &[&[bf16("gate_up", |s| s.rows * 2 * s.shape.ffn), bf16("inner", |s| s.rows * s.shape.ffn), NUM_TOKENS]],
};
const SWIGLU_BACKWARD: Signature<Sizes> = Signature {
    name: "swiglu_backward",
    params: &[&[bf16("gate_up", |s| s.rows * 2 * s.shape.ffn), bf16("d_inner", |s| s.rows * s.shape.ffn), NUM_TOKENS]],
    ..SWIGLU
};
const ANGLES_AND_NORMS: &[Param<Sizes>] = &[
    aligned(|_| 16, float32("cosines", |s| s.rows * s.shape.head_dim / 2)),
    aligned(|_| 16, float32("sines", |s| s.rows * s.shape.head_dim / 2)),
    nullable(bf16("q_norm", |s| s.shape.head_dim)),
    nullable(bf16("k_norm", |s| s.shape.head_dim)),
    nullable(bf16("qk", |s| num_rotated_heads(s) * s.shape.head_dim)),
];
const ROTATE: Signature<Sizes> = Signature {
    name: "rotate",
    grid: |s| [num_rotation_blocks(s), 1],
    threads: |_| THREADS,
    params: &[&[bf16("qkv", |s| s.rows * s.shape.qkv())], ANGLES_AND_NORMS, &[NUM_TOKENS]],
};
const ROTATE_BACKWARD: Signature<Sizes> = Signature {
    name: "rotate_backward",
    grid: |s| [num_summing_blocks(num_rotation_blocks(s)), 1],
    threads: |_| THREADS,
    params: &[
        &[bf16("d_qkv", |s| s.rows * s.shape.qkv())],
        ANGLES_AND_NORMS,
        &[
            nullable(float32("d_weights_partial", |s| {
                num_summing_blocks(num_rotation_blocks(s)) * 2 * s.shape.head_dim
            })),
            NUM_TOKENS,
        ],
    ],
};
const LOGSUMEXP: Signature<Sizes> =
    Signature { name: "logsumexp", grid: |s| [s.rows, 1], threads: |_| LOGITS_THREADS, params: &[&[LOGITS, OUT]] };
const DIVERGENCE: Signature<Sizes> = Signature {
    name: "divergence",
    grid: |s| [s.rows, 1],
    threads: |_| LOGITS_THREADS,
    params: &[&[
        LOGITS,
        LOGSUMEXPS,
        launch::bf16("targets", |s| s.target_rows * pitch(s)),
        float32("target_logsumexps", |s| s.target_rows),
        int64("target_rows", |s| s.rows),
        nullable(float32("weights", |s| s.rows)),
        int("kind"),
        float("scale"),
        OUT,
    ]],
};
const CROSS_ENTROPY: Signature<Sizes> = Signature {
    name: "cross_entropy",
    grid: |s| [s.rows, 1],
    threads: |_| LOGITS_THREADS,
    params: &[&[
        LOGITS,
        LOGSUMEXPS,
        int64("labels", |s| s.rows),
        float("scale"),
        nullable(launch::bf16("teacher", |s| s.rows * pitch(s))),
        nullable(float32("teacher_logsumexps", |s| s.rows)),
        float("teacher_scale"),
        OUT,
        nullable(float32("teacher_out", |s| s.rows)),
    ]],
};

/// Kernels of one shape on one device. Tensors are contiguous, bfloat16 unless said otherwise; `T`
/// is the number of tokens.
pub struct TrainKernels {
    shape: KernelShape,
    rms_norm: Kernel<Sizes>,
    rms_norm_backward: Kernel<Sizes>,
    swiglu: Kernel<Sizes>,
    swiglu_backward: Kernel<Sizes>,
    rotate: Kernel<Sizes>,
    rotate_backward: Kernel<Sizes>,
    logsumexp: Kernel<Sizes>,
    divergence: Kernel<Sizes>,
    cross_entropy: Kernel<Sizes>,
}

/// Logits with the logsumexp of each row, float32 `[rows]`.
pub struct Logits {
    /// `[rows, pitch]`: rows are padded so that they are aligned.
    padded: Tensor,
    vocab: usize,
    logsumexps: Tensor,
}

/// For each row of the student's logits, the row of the target's logits that it is compared with.
pub struct TargetRows {
    /// int64, each below `bound`.
    rows: Tensor,
    bound: usize,
}

/// The token that each row of logits should predict; negative for none.
pub struct Labels {
    /// int64; each is negative or below `vocab`.
    ids: Tensor,
    vocab: usize,
}

impl Logits {
    /// The logits `[rows, vocab]`, or their gradient once a loss has replaced them.
    pub fn values(&self) -> Tensor {
        self.padded.narrow(1, 0, self.vocab as i64)
    }

    /// The logsumexp of each row, float32 `[rows]`.
    pub fn logsumexps(&self) -> &Tensor {
        &self.logsumexps
    }

    /// The same padded to a multiple of 8 columns. In the padding, gradients are 0.
    pub(crate) fn padded(&self) -> &Tensor {
        &self.padded
    }

    fn num_rows(&self) -> usize {
        self.logsumexps.numel()
    }

    /// The leading `num_rows` rows.
    fn leading(&self, num_rows: usize) -> Result<(Tensor, Tensor)> {
        self.narrow(0, num_rows)
    }

    fn narrow(&self, first: usize, num_rows: usize) -> Result<(Tensor, Tensor)> {
        let rows = |tensor: &Tensor| tensor.f_narrow(0, first as i64, num_rows as i64);
        Ok((rows(&self.padded)?, rows(&self.logsumexps)?))
    }
}

impl TargetRows {
    /// Copies `rows`, indices into a target's `num_rows` rows, to the device.
    ///
    /// # Errors
    /// [`Error::Internal`] for an index that is out of range, else [`Error::Torch`].
    pub fn new(rows: &[i64], num_rows: usize, device: Device) -> Result<Self> {
        if let Some(row) = rows.iter().find(|row| !(0..num_rows as i64).contains(row)) {
            return Err(Error::internal(format!(
                "target row {row} is out of range: there are {num_rows} rows of logits"
            )));
        }
        Ok(TargetRows { rows: upload(rows, device)?, bound: num_rows })
    }

    /// Pairs each row of the student with the target's row at the same index.
    ///
    /// # Errors
    /// [`Error::Torch`].
    pub fn identity(num_rows: usize, device: Device) -> Result<Self> {
        Ok(TargetRows { rows: Tensor::f_arange(num_rows as i64, (Kind::Int64, device))?, bound: num_rows })
    }
}

impl Labels {
    /// # Errors
    /// [`Error::Internal`] for an id that the vocabulary does not have, else [`Error::Torch`].
    pub fn new(ids: &[i64], vocab: usize, device: Device) -> Result<Self> {
        // Kernels read the low 32 bits.
        let is_valid = |id: i64| i32::try_from(id).is_ok_and(|id| i64::from(id) < vocab as i64);
        if let Some(id) = ids.iter().find(|id| !is_valid(**id)) {
            return Err(Error::internal(format!("label {id} is outside the vocabulary of {vocab} tokens")));
        }
        Ok(Labels { ids: upload(ids, device)?, vocab })
    }
}

impl TrainKernels {
    /// Compiles and loads the kernels.
    ///
    /// # Errors
    /// [`Error::Torch`] with the message of the compiler or the driver.
    pub fn new(device: usize, shape: KernelShape) -> Result<Self> {
        let module = Module::compiled(device, SOURCE, &macros(&shape))?;
        let kernel = |signature| Kernel::new(&module, signature, "", 0, false);
        Ok(TrainKernels {
            rms_norm: kernel(&RMS_NORM)?,
            rms_norm_backward: kernel(&RMS_NORM_BACKWARD)?,
            swiglu: kernel(&SWIGLU)?,
            swiglu_backward: kernel(&SWIGLU_BACKWARD)?,
            rotate: kernel(&ROTATE)?,
            rotate_backward: kernel(&ROTATE_BACKWARD)?,
            logsumexp: kernel(&LOGSUMEXP)?,
            divergence: kernel(&DIVERGENCE)?,
            cross_entropy: kernel(&CROSS_ENTROPY)?,
            shape,
        })
    }

    /// RMS norm of `x [T, hidden]`; or of the sum of `x` and `update`, which becomes that sum.
    ///
    /// # Errors
    /// [`Error::Internal`] if a tensor does not fit, else [`Error::Torch`]; here and below.
    pub fn rms_norm(&self, x: &Tensor, update: Option<&Tensor>, weight: &Tensor) -> Result<Tensor> {
        let out = x.f_empty_like()?;
        let arguments = [Data(x), Optional(update), Data(weight), Data(&out)];
        // SAFETY: no argument is an index.
        unsafe { self.rms_norm.launch(&self.tokens_of(x), &arguments)? };
        Ok(out)
    }

    /// Adds to `d_residual [T, hidden]` the gradient that `d_out` gives the input `x` of a norm.
    /// Returns terms whose sum is the gradient of the weight, float32 `[terms, hidden]`.
    pub fn rms_norm_backward(
        &self,
        x: &Tensor,
        weight: &Tensor,
        d_out: &Tensor,
        d_residual: &Tensor,
    ) -> Result<Tensor> {
        let sizes = self.tokens_of(x);
        let num_blocks = num_summing_blocks(num_norm_blocks(&sizes));
        let partial_size = [num_blocks as i64, self.shape.hidden as i64];
        let partial = Tensor::f_empty(partial_size, (Kind::Float, x.device()))?;
        let arguments = [x, weight, d_out, d_residual, d_residual, &partial].map(Data);
        // SAFETY: no argument is an index.
        unsafe { self.rms_norm_backward.launch(&sizes, &arguments)? };
        Ok(partial)
    }

    /// `silu(gate) * up [T, ffn]` of `gate_up [T, 2 ffn]`.
    pub fn swiglu(&self, gate_up: &Tensor) -> Result<Tensor> {
        let sizes = self.sizes(gate_up.numel() / (2 * self.shape.ffn));
        let inner_size = [sizes.rows as i64, self.shape.ffn as i64];
        let inner = Tensor::f_empty(inner_size, (Kind::BFloat16, gate_up.device()))?;
        // SAFETY: no argument is an index.
        unsafe { self.swiglu.launch(&sizes, &[Data(gate_up), Data(&inner)])? };
        Ok(inner)
    }

    /// In place: `gate_up [T, 2 ffn]` becomes its gradient, and `d_inner [T, ffn]`, the gradient of
    /// [`Self::swiglu`]'s result, becomes that result.
    pub fn swiglu_backward(&self, gate_up: &Tensor, d_inner: &Tensor) -> Result<()> {
        let sizes = self.sizes(gate_up.numel() / (2 * self.shape.ffn));
        // SAFETY: no argument is an index.
        unsafe { self.swiglu_backward.launch(&sizes, &[Data(gate_up), Data(d_inner)]) }
    }

    /// In place, norms the queries and keys of `qkv [T, (heads + 2 kv_heads) head_dim]` if the model
    /// has weights `qk_norm [head_dim]` for that, and rotates them by angles with these cosines and
    /// sines, float32 `[T, head_dim / 2]`. Returns what the backward of the norms needs, the queries
    /// and keys before it, `[T, heads + kv_heads, head_dim]`.
    pub fn rotate(
        &self,
        qkv: &Tensor,
        (cosines, sines): (&Tensor, &Tensor),
        qk_norm: Option<(&Tensor, &Tensor)>,
    ) -> Result<Option<Tensor>> {
        let sizes = self.sizes(qkv.numel() / self.shape.qkv());
        self.check_norms(qk_norm.is_some())?;
        let qk_size = [sizes.rows, self.shape.heads + self.shape.kv_heads, self.shape.head_dim].map(|size| size as i64);
        let qk = qk_norm.map(|_| Tensor::f_empty(qk_size, (Kind::BFloat16, qkv.device()))).transpose()?;
        let (q_norm, k_norm) = qk_norm.unzip();
        let arguments =
            [Data(qkv), Data(cosines), Data(sines), Optional(q_norm), Optional(k_norm), Optional(qk.as_ref())];
        // SAFETY: no argument is an index, and the pointers of the norms are null together, as the
        // kernels were compiled.
        unsafe { self.rotate.launch(&sizes, &arguments)? };
        Ok(qk)
    }

    /// Turns, in place, the gradient of [`Self::rotate`]'s result into that of what it was given.
    /// `norms`: the weights, and what it returned. Returns terms whose sums are the gradients of the
    /// weights of the norms of queries and keys, float32 `[terms, 2, head_dim]`.
    pub fn rotate_backward(
        &self,
        d_qkv: &Tensor,
        (cosines, sines): (&Tensor, &Tensor),
        norms: Option<((&Tensor, &Tensor), &Tensor)>,
    ) -> Result<Option<Tensor>> {
        let sizes = self.sizes(d_qkv.numel() / self.shape.qkv());
        self.check_norms(norms.is_some())?;
        let num_blocks = num_summing_blocks(num_rotation_blocks(&sizes));
        let partial_size = [num_blocks, 2, self.shape.head_dim].map(|size| size as i64);
        let partial = norms.map(|_| Tensor::f_empty(partial_size, (Kind::Float, d_qkv.device()))).transpose()?;
        let (weights, qk) = norms.unzip();
        let (q_norm, k_norm) = weights.unzip();
        let norms = [q_norm, k_norm, qk, partial.as_ref()].map(Optional);
        let arguments = [&[Data(d_qkv), Data(cosines), Data(sines)], &norms[..]].concat();
        // SAFETY: as in `rotate`.
        unsafe { self.rotate_backward.launch(&sizes, &arguments)? };
        Ok(partial)
    }

    /// Kernels with norms read their weights, and kernels without do not.
    fn check_norms(&self, are_given: bool) -> Result<()> {
        if are_given == self.shape.query_key_norm {
            return Ok(());
        }
        Err(Error::internal("the kernels were compiled for another number of norms"))
    }

    /// The logits of `hidden [rows, hidden]` by the output projection `lm_head [vocab, hidden]`, for
    /// losses. It is padded to a multiple of 8 rows.
    pub fn logits(&self, hidden: &Tensor, lm_head: &Tensor) -> Result<Logits> {
        let sizes = self.sizes(hidden.size()[0] as usize);
        let padded_size = [sizes.rows, pitch(&sizes)].map(|size| size as i64);
        let logits = Logits {
            padded: Tensor::f_empty(padded_size, (Kind::BFloat16, hidden.device()))?,
            vocab: self.shape.vocab,
            logsumexps: Tensor::f_empty([sizes.rows as i64], (Kind::Float, hidden.device()))?,
        };
        let _ = hidden.f_mm_out(&logits.padded, &lm_head.f_tr()?)?;
        // SAFETY: no argument is an index.
        unsafe { self.logsumexp.launch(&sizes, &[Data(&logits.padded), Data(&logits.logsumexps)])? };
        Ok(logits)
    }

    /// The divergence of the student's rows, from `first` on, from the target's rows: float32, one
    /// for each of `target_rows`. The student's logits become the gradient, times `scale` and, if
    /// there are `weights`, the row's weight, float32 `[rows]`. The target may be other rows of the
    /// same logits.
    pub fn divergence(
        &self,
        (student, first): (&Logits, usize),
        (target, target_rows): (&Logits, &TargetRows),
        divergence: Divergence,
        scale: f64,
        weights: Option<&Tensor>,
    ) -> Result<Tensor> {
        if target_rows.bound > target.num_rows() {
            return Err(Error::internal("the target rows belong to other logits"));
        }
        let num_rows = target_rows.rows.numel();
        let sizes = Sizes { target_rows: target.num_rows(), ..self.sizes(num_rows) };
        let (logits, logsumexps) = student.narrow(first, num_rows)?;
        let out = Tensor::f_empty([num_rows as i64], (Kind::Float, logits.device()))?;
        let tensors = [&logits, &logsumexps, &target.padded, &target.logsumexps, &target_rows.rows];
        let rest = [Optional(weights), Int(divergence as i32), Float(scale as f32), Data(&out)];
        // SAFETY: every target row is one of the target's.
        unsafe { self.divergence.launch(&sizes, &[&tensors.map(Data)[..], &rest].concat())? };
        Ok(out)
    }

    /// Cross-entropy of the labels with the leading rows of a student, one row for each label; and,
    /// with a teacher's logits of the same rows, KL(teacher || student): float32 each. The
    /// student's logits become the gradient of both, each times its own scale.
    pub fn cross_entropy(
        &self,
        student: &Logits,
        labels: &Labels,
        scale: f64,
        teacher: Option<(&Logits, f64)>,
    ) -> Result<(Tensor, Option<Tensor>)> {
        if labels.vocab > self.shape.vocab {
            return Err(Error::internal("the labels belong to another vocabulary"));
        }
        let num_rows = labels.ids.numel();
        let empty = || Tensor::f_empty([num_rows as i64], (Kind::Float, student.padded.device()));
        let (out, teacher_out) = (empty()?, teacher.is_some().then(empty).transpose()?);
        let (logits, logsumexps) = student.leading(num_rows)?;
        let teacher_scale = teacher.map_or(0.0, |(_, scale)| scale);
        let teacher = teacher.map(|(teacher, _)| teacher.leading(num_rows)).transpose()?;
        let arguments = [
            Data(&logits),
            Data(&logsumexps),
            Data(&labels.ids),
            Float(scale as f32),
            Optional(teacher.as_ref().map(|teacher| &teacher.0)),
            Optional(teacher.as_ref().map(|teacher| &teacher.1)),
            Float(teacher_scale as f32),
            Data(&out),
            Optional(teacher_out.as_ref()),
        ];
        // SAFETY: `Labels` holds ids of the vocabulary, or negative numbers, which the kernel
        // skips. The three pointers of the teacher are null together.
        unsafe { self.cross_entropy.launch(&self.sizes(num_rows), &arguments)? };
        Ok((out, teacher_out))
    }

    fn sizes(&self, rows: usize) -> Sizes {
        Sizes { shape: self.shape, rows, target_rows: 0 }
    }

    fn tokens_of(&self, x: &Tensor) -> Sizes {
        self.sizes(x.numel() / self.shape.hidden)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::launch::tests::assert_declared;
    use crate::cuda::nvrtc::compile;

    #[test]
    fn the_kernels_compile_without_a_gpu() {
        let small = KernelShape::SMOLLM2;
        let large = KernelShape { hidden: 4096, heads: 32, kv_heads: 8, head_dim: 128, ffn: 12288, ..small };
        let large = KernelShape { vocab: 151_936, query_key_norm: true, ..large };
        let odd = KernelShape { hidden: 100, heads: 3, kv_heads: 1, head_dim: 20, ffn: 77, vocab: 50_257, ..large };
        for shape in [small, large, odd] {
            assert_eq!(shape.is_aligned(), shape != odd);
            assert!(compile(SOURCE, (9, 0), &macros(&shape)).unwrap().is_elf());
        }
    }

    #[test]
    fn the_signatures_match_the_source() {
        let logits = [LOGSUMEXP, DIVERGENCE, CROSS_ENTROPY];
        let signatures = [RMS_NORM, RMS_NORM_BACKWARD, SWIGLU, SWIGLU_BACKWARD, ROTATE, ROTATE_BACKWARD];
        for signature in signatures.iter().chain(&logits) {
            assert_declared(SOURCE, signature);
        }
        let num_kernels = SOURCE.matches("\"C\" __global__").count();
        assert_eq!(num_kernels, signatures.len() + logits.len(), "a kernel has no signature");
    }

    #[test]
    fn rows_and_labels_that_do_not_exist_are_refused() {
        let refused = |rows: &[i64]| TargetRows::new(rows, 3, Device::Cpu).is_err();
        assert!(!refused(&[0, 2, 2]) && refused(&[0, 3]) && refused(&[-1]));
        assert_eq!(Vec::<i64>::try_from(&TargetRows::identity(3, Device::Cpu).unwrap().rows).unwrap(), [0, 1, 2]);
        assert!(Labels::new(&[-100, 0, 7], 8, Device::Cpu).is_ok());
        assert!(Labels::new(&[8], 8, Device::Cpu).is_err() && Labels::new(&[i64::MIN], 8, Device::Cpu).is_err());
    }
}
