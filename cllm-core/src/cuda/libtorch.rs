//! What libtorch has but tch lacks, and memory maps.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::fs::File;
use std::path::Path;

use tch::{Device, Kind, Tensor};

use crate::{Error, Result};

unsafe extern "C" {
    fn cllm_last_error() -> *const c_char;
    fn cllm_fused_adamw(
        tensors: *const *mut c_void,
        number: f64,
        lr: f64,
        beta1: f64,
        beta2: f64,
        weight_decay: f64,
        eps: f64,
    ) -> c_int;
    fn cllm_collect_gradient(tensor: *mut c_void, gradient: *mut c_void) -> c_int;
    fn cllm_backward(tensor: *mut c_void, gradient: *mut c_void) -> c_int;
    fn cllm_cuda_memory(device: c_int, current: *mut i64, peak: *mut i64) -> c_int;
    fn cllm_cuda_reset_peak(device: c_int) -> c_int;
}

pub(super) fn checked(status: c_int) -> Result<()> {
    if status == 0 {
        return Ok(());
    }
    // SAFETY: the message is a NUL-terminated string of this thread, valid until its next failing call.
    let message = unsafe { CStr::from_ptr(cllm_last_error()) }.to_string_lossy().into_owned();
    Err(Error::Torch(tch::TchError::Torch(message)))
}

/// Numbers of one AdamW step (Loshchilov & Hutter, arXiv 1711.05101).
#[derive(Debug, Clone, Copy)]
pub struct AdamW<'t> {
    /// Learning rate.
    pub lr: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Added to the denominator.
    pub eps: f64,
    /// Number of this step, from 1.
    pub number: usize,
    /// What the gradients are divided by: a float32 scalar on their device.
    pub scale: &'t Tensor,
    /// 1 where nothing may change, else 0: another. So clipping and leaving out a step wait for no answer of the device.
    pub skip: &'t Tensor,
}

/// One fused AdamW step in place; all tensors are float32, of one shape, on one device.
///
/// # Errors
/// [`Error::Torch`] when shapes, types or devices differ.
pub fn fused_adamw(
    numbers: &AdamW<'_>,
    parameters: &Tensor,
    gradients: &Tensor,
    first: &Tensor,
    second: &Tensor,
) -> Result<()> {
    let AdamW { lr, beta1, beta2, weight_decay, eps, number, scale, skip } = *numbers;
    let tensors = [parameters, gradients, first, second, scale, skip].map(pointer);
    // SAFETY: the array holds the six tensors that the other side reads.
    checked(unsafe { cllm_fused_adamw(tensors.as_ptr(), number as f64, lr, beta1, beta2, weight_decay, eps) })
}

pub(super) fn pointer(tensor: &Tensor) -> *mut c_void {
    tensor.as_ptr().cast_mut().cast()
}

/// From now on every backward adds the gradient of a leaf to `gradient`, of its shape and type.
///
/// # Errors
/// [`Error::Torch`] when shapes, types or devices differ.
pub fn accumulate_grad_into(leaf: &Tensor, gradient: &Tensor) -> Result<()> {
    // SAFETY: both are valid tensors.
    checked(unsafe { cllm_collect_gradient(pointer(leaf), pointer(gradient)) })
}

/// Runs the backward of a tensor from its gradient, of its shape.
///
/// # Errors
/// [`Error::Torch`], such as memory that ran out.
pub fn backward(tensor: &Tensor, gradient: &Tensor) -> Result<()> {
    // SAFETY: both are valid tensors.
    checked(unsafe { cllm_backward(pointer(tensor), pointer(gradient)) })
}

/// Bytes of GPU memory in use and their peak since [`reset_peak_gpu_memory`]; `None` on the CPU.
pub fn gpu_memory(device: Device) -> Option<(u64, u64)> {
    let Device::Cuda(index) = device else { return None };
    let (mut current, mut peak) = (0i64, 0i64);
    // SAFETY: both pointers are valid for the call.
    checked(unsafe { cllm_cuda_memory(c_int::try_from(index).ok()?, &mut current, &mut peak) }).ok()?;
    Some((u64::try_from(current).ok()?, u64::try_from(peak).ok()?))
}

/// Starts a new measurement of peak memory; does nothing on the CPU.
pub fn reset_peak_gpu_memory(device: Device) {
    if let Device::Cuda(index) = device {
        // SAFETY: no pointers are passed. A failure only leaves the old peak.
        let _ = unsafe { cllm_cuda_reset_peak(index as c_int) };
    }
}

/// `left [.., k] x right [n, k] transposed -> [.., n]` in float32: the product is accumulated *and returned* in float32, also
/// for bf16 inputs on a GPU, where a bf16 result would make ties of different logits. No gradient flows through it.
///
/// # Errors
/// [`Error::Torch`] when the shapes do not fit.
pub fn matmul_float32(left: &Tensor, right: &Tensor) -> Result<Tensor> {
    let mut shape = left.size();
    let width = shape.pop().unwrap_or(1);
    let flat = left.f_reshape([-1, width])?;
    let product = if left.device().is_cuda() && left.kind() != Kind::Float {
        flat.f_mm_dtype(&right.f_tr()?, Kind::Float)?
    } else {
        flat.f_to_kind(Kind::Float)?.f_mm(&right.f_to_kind(Kind::Float)?.f_tr()?)?
    };
    shape.push(right.size()[0]);
    Ok(product.f_reshape(shape)?)
}

/// A file mapped into memory, read-only.
///
/// # Errors
/// When it cannot be opened or mapped.
pub fn map_file(path: &Path) -> Result<memmap2::Mmap> {
    let file = File::open(path).map_err(Error::io(path))?;
    // SAFETY: model files are not changed while they are read; a concurrent truncation would end the process.
    unsafe { memmap2::Mmap::map(&file) }.map_err(Error::io(path))
}

/// A CPU tensor copied from raw little-endian bytes.
///
/// # Errors
/// When the number of bytes does not fit the shape.
pub fn tensor_from_bytes(bytes: &[u8], shape: &[i64], kind: Kind) -> Result<Tensor> {
    // tch copies as many bytes as the shape asks for without looking at the slice.
    let needed =
        shape.iter().try_fold(kind.elt_size_in_bytes(), |bytes, &size| bytes.checked_mul(usize::try_from(size).ok()?));
    if needed != Some(bytes.len()) {
        let message = format!("{} bytes do not fill a {kind:?} tensor of shape {shape:?}", bytes.len());
        return Err(Error::Torch(tch::TchError::Shape(message)));
    }
    Ok(Tensor::f_from_data_size(bytes, shape, kind)?)
}

/// The raw little-endian bytes of a tensor, copied to the host in its own type.
///
/// # Errors
/// [`Error::Torch`] when the copy fails.
pub fn tensor_to_bytes(tensor: &Tensor) -> Result<Vec<u8>> {
    let tensor = tensor.f_detach()?.f_to(Device::Cpu)?.f_contiguous()?;
    let mut bytes = vec![0u8; tensor.numel() * tensor.kind().elt_size_in_bytes()];
    tensor.f_copy_data_u8(&mut bytes, tensor.numel())?;
    Ok(bytes)
}
