//! The kernels of AdamW (csrc/optimizer.cu): one pass over weights, gradients and moments.

use tch::{Device, Tensor};

use super::launch::{Argument, Kernel, Param, Signature, bf16, count, float, float32, long};
use super::libtorch::AdamW;
use super::nvrtc::{Macros, Module};
use crate::Result;
use Argument::{Float, Long, Tensor as Data};

const SOURCE: &str = concat!(include_str!("../../csrc/bf16.cuh"), include_str!("../../csrc/optimizer.cu"));
const THREADS: usize = 256;
/// Elements that a thread updates.
const ELEMENTS: usize = 8;

struct Sizes {
    elements: usize,
}

const INPUTS: &[Param<Sizes>] = &[
    bf16("gradients", |s| s.elements),
    float32("gradient_scale", |_| 1),
    float32("skip", |_| 1),
    long("num_decayed"),
    float("decay"),
    float("beta1"),
    float("beta2"),
    float("step_size"),
    float("deviation_scale"),
    float("eps"),
];
const NUM_THREADS: Param<Sizes> = count("threads", |s| s.elements / ELEMENTS);

const ADAMW_BF16: Signature<Sizes> = Signature {
    name: "adamw_bf16",
    grid: |s| [(s.elements / ELEMENTS).div_ceil(THREADS), 1],
    threads: |_| THREADS,
    params: &[
        INPUTS,
        &[
            bf16("weights", |s| s.elements),
            bf16("exp_avg", |s| s.elements),
            bf16("exp_avg_sq", |s| s.elements),
            long("first_element"),
            long("seed"),
            NUM_THREADS,
        ],
    ],
};
const ADAMW_FLOAT32: Signature<Sizes> = Signature {
    name: "adamw_float32",
    params: &[
        INPUTS,
        &[
            aligned_float32("master_weights"),
            aligned_float32("exp_avg"),
            aligned_float32("exp_avg_sq"),
            bf16("weights", |s| s.elements),
            NUM_THREADS,
        ],
    ],
    ..ADAMW_BF16
};

/// The kernels on one device. All tensors of a step are contiguous, `[elements]`, a multiple of 8,
/// and start at a multiple of 16 bytes.
pub struct AdamWKernels {
    bf16: Kernel<Sizes>,
    float32: Kernel<Sizes>,
}

/// The randomness of stochastic rounding. Elements are rounded alike however they are divided into
/// shards.
#[derive(Debug, Clone, Copy)]
pub struct RoundingNoise {
    /// A new one for each step.
    pub seed: u64,
    /// Index of the first of the elements among those of all shards, a multiple of 8.
    pub first_element: usize,
}

impl AdamWKernels {
    /// Compiles and loads the kernels. `None` on the CPU.
    ///
    /// # Errors
    /// [`crate::Error::Torch`] with the message of the compiler or the driver.
    pub fn new(device: Device) -> Result<Option<Self>> {
        let Device::Cuda(device) = device else { return Ok(None) };
        let module = Module::compiled(device, SOURCE, &Macros::new())?;
        let kernel = |signature| Kernel::new(&module, signature, "", 0, false);
        Ok(Some(AdamWKernels { bf16: kernel(&ADAMW_BF16)?, float32: kernel(&ADAMW_FLOAT32)? }))
    }

    /// One step in place. All tensors are bfloat16, and rounded stochastically. Only the leading
    /// `num_decayed` weights decay.
    ///
    /// # Errors
    /// [`crate::Error::Internal`] if a tensor does not fit, else [`crate::Error::Torch`]; here and
    /// below.
    pub fn step_bf16(
        &self,
        numbers: &AdamW<'_>,
        num_decayed: usize,
        gradients: &Tensor,
        [weights, exp_avg, exp_avg_sq]: [&Tensor; 3],
        noise: RoundingNoise,
    ) -> Result<()> {
        let inputs = inputs(numbers, num_decayed, gradients);
        let noise = [Long(noise.first_element as i64), Long(noise.seed.cast_signed())];
        let arguments = [&inputs[..], &[weights, exp_avg, exp_avg_sq].map(Data), &noise].concat();
        // SAFETY: no argument is an index.
        unsafe { self.bf16.launch(&Sizes { elements: gradients.numel() }, &arguments) }
    }

    /// One step in place. Gradients are bfloat16, master weights and moments float32. `weights`,
    /// bfloat16, become the rounded master weights. Only the leading `num_decayed` weights decay.
    pub fn step_float32(
        &self,
        numbers: &AdamW<'_>,
        num_decayed: usize,
        gradients: &Tensor,
        [master_weights, exp_avg, exp_avg_sq]: [&Tensor; 3],
        weights: &Tensor,
    ) -> Result<()> {
        let inputs = inputs(numbers, num_decayed, gradients);
        let arguments = [&inputs[..], &[master_weights, exp_avg, exp_avg_sq, weights].map(Data)].concat();
        // SAFETY: no argument is an index.
        unsafe { self.float32.launch(&Sizes { elements: gradients.numel() }, &arguments) }
    }
}

fn inputs<'t>(numbers: &AdamW<'t>, num_decayed: usize, gradients: &'t Tensor) -> [Argument<'t>; 10] {
    let AdamW { lr, beta1, beta2, weight_decay, eps, step, scale, skip } = *numbers;
    let bias_correction = |beta: f64| 1.0 - beta.powi(step as i32);
    let float = |number: f64| Float(number as f32);
    [
        Data(gradients),
        Data(scale),
        Data(skip),
        Long(num_decayed as i64),
        float(1.0 - lr * weight_decay),
        float(beta1),
        float(beta2),
        float(lr / bias_correction(beta1)),
        float(bias_correction(beta2).sqrt().recip()),
        float(eps),
    ]
}

/// float32, read 16 bytes at a time.
const fn aligned_float32(name: &'static str) -> Param<Sizes> {
    super::launch::aligned(|_| 16, float32(name, |s| s.elements))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::launch::tests::assert_declared;
    use crate::cuda::nvrtc::compile;

    #[test]
    fn the_kernels_compile_without_a_gpu_and_match_their_signatures() {
        assert!(compile(SOURCE, (7, 5), &Macros::new()).unwrap().is_elf());
        assert_declared(SOURCE, &ADAMW_BF16);
        assert_declared(SOURCE, &ADAMW_FLOAT32);
        assert_eq!(SOURCE.matches("\"C\" __global__").count(), 2, "a kernel has no signature");
    }
}
