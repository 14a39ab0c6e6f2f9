//! Functions of libtorch that tch does not offer, and memory maps.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::fs::File;
use std::path::Path;

use tch::{Device, Kind, Tensor};

use crate::{Error, Result};

unsafe extern "C" {
    fn cllm_last_error() -> *const c_char;
    fn cllm_fused_adamw(
        tensors: *const *mut c_void,
        step: f64,
        lr: f64,
        beta1: f64,
        beta2: f64,
        weight_decay: f64,
        eps: f64,
    ) -> c_int;
    fn cllm_set_grad(tensor: *mut c_void, grad: *mut c_void) -> c_int;
    fn cllm_drop_grad(tensor: *mut c_void) -> c_int;
    fn cllm_backward(tensor: *mut c_void, grad: *mut c_void) -> c_int;
    fn cllm_pin_memory(tensor: *mut c_void, pinned: *mut *mut c_void) -> c_int;
    fn cllm_gpu_memory(device: c_int, current: *mut i64, peak: *mut i64) -> c_int;
    fn cllm_peak_reserved_gpu_memory(device: c_int, peak: *mut i64) -> c_int;
    fn cllm_gpu_capacity(device: c_int, free: *mut i64, total: *mut i64) -> c_int;
    fn cllm_reset_peak_gpu_memory(device: c_int) -> c_int;
    fn cllm_cpu_memory_begin() -> c_int;
    fn cllm_cpu_memory_end(peak: *mut i64) -> c_int;
}

/// Turns the status of a function in `csrc/` into a result.
pub(super) fn checked(status: c_int) -> Result<()> {
    if status == 0 {
        return Ok(());
    }
    // SAFETY: the message is a NUL-terminated string of this thread, valid until its next failing
    // call.
    let message = unsafe { CStr::from_ptr(cllm_last_error()) }.to_string_lossy().into_owned();
    Err(Error::Torch(tch::TchError::Torch(message)))
}

/// The `at::Tensor` behind a tensor.
pub(super) fn pointer(tensor: &Tensor) -> *mut c_void {
    tensor.as_ptr().cast_mut().cast()
}

/// The hyperparameters and scalars of one AdamW step (Loshchilov & Hutter, arXiv 1711.05101).
#[derive(Debug, Clone, Copy)]
pub struct AdamW<'t> {
    pub lr: f64,
    pub beta1: f64,
    pub beta2: f64,
    pub weight_decay: f64,
    pub eps: f64,
    /// Number of this step, from 1.
    pub step: usize,
    /// Float32 scalar that gradients are divided by. It stays on the device so that clipping needs
    /// no host sync.
    pub scale: &'t Tensor,
    /// Float32 scalar: 1 skips the update, 0 applies it. It stays on the device so that skipping a
    /// step needs no host sync.
    pub skip: &'t Tensor,
}

/// One fused AdamW step in place. All tensors are float32, of one shape, on one device.
///
/// # Errors
/// [`Error::Internal`] if they are not, else [`Error::Torch`].
pub fn fused_adamw(
    numbers: &AdamW<'_>,
    weights: &Tensor,
    gradients: &Tensor,
    exp_avg: &Tensor,
    exp_avg_sq: &Tensor,
) -> Result<()> {
    let AdamW { lr, beta1, beta2, weight_decay, eps, step, scale, skip } = *numbers;
    let tensors = [weights, gradients, exp_avg, exp_avg_sq, scale, skip];
    // libtorch's CPU path trusts the sizes.
    let is_float_here = |x: &Tensor| x.kind() == Kind::Float && x.device() == weights.device() && x.is_contiguous();
    let is_valid = tensors.iter().all(|x| is_float_here(x))
        && tensors[..4].iter().all(|x| x.numel() == weights.numel())
        && scale.numel() == 1
        && skip.numel() == 1;
    if !is_valid {
        return Err(Error::internal("the tensors of an AdamW step differ in type, size or device"));
    }
    let tensors = tensors.map(pointer);
    // SAFETY: the array holds the six tensors that the other side reads, which fit each other.
    checked(unsafe { cllm_fused_adamw(tensors.as_ptr(), step as f64, lr, beta1, beta2, weight_decay, eps) })
}

/// Makes every backward from now on add the gradient of a leaf to `gradient`, which has its size.
///
/// # Errors
/// [`Error::Internal`] if sizes or devices differ, else [`Error::Torch`].
pub fn accumulate_grad_into(leaf: &Tensor, gradient: &Tensor) -> Result<()> {
    if leaf.size() != gradient.size() || leaf.device() != gradient.device() {
        return Err(Error::internal("a gradient differs from its weight in size or device"));
    }
    // SAFETY: both are valid tensors.
    checked(unsafe { cllm_set_grad(pointer(leaf), pointer(gradient)) })
}

/// Takes its gradient from a leaf.
///
/// # Errors
/// [`Error::Torch`].
pub fn drop_gradient(leaf: &Tensor) -> Result<()> {
    // SAFETY: it is a valid tensor.
    checked(unsafe { cllm_drop_grad(pointer(leaf)) })
}

/// Runs the backward of a tensor, given its gradient of the same size.
///
/// # Errors
/// [`Error::Torch`], such as when memory runs out.
pub fn backward(tensor: &Tensor, gradient: &Tensor) -> Result<()> {
    // SAFETY: both are valid tensors.
    checked(unsafe { cllm_backward(pointer(tensor), pointer(gradient)) })
}

/// A copy of a tensor of the host in pinned memory, from which a GPU copies while the host goes on.
///
/// # Errors
/// [`Error::Torch`], such as when there is no GPU.
pub fn pin_memory(tensor: &Tensor) -> Result<Tensor> {
    let mut pinned = std::ptr::null_mut();
    // SAFETY: both pointers are valid for the call.
    checked(unsafe { cllm_pin_memory(pointer(tensor), &mut pinned) })?;
    // SAFETY: the call succeeded, so it is a new at::Tensor, which nothing else owns.
    Ok(unsafe { Tensor::from_ptr(pinned.cast()) })
}

/// Bytes of GPU memory that tensors use now, and the peak since [`reset_peak_gpu_memory`]. `None`
/// on the CPU.
pub fn gpu_memory(device: Device) -> Option<(u64, u64)> {
    let Device::Cuda(index) = device else { return None };
    let (mut current, mut peak) = (0i64, 0i64);
    // SAFETY: both pointers are valid for the call.
    checked(unsafe { cllm_gpu_memory(c_int::try_from(index).ok()?, &mut current, &mut peak) }).ok()?;
    Some((u64::try_from(current).ok()?, u64::try_from(peak).ok()?))
}

/// The peak, since [`reset_peak_gpu_memory`], of what libtorch has taken from a GPU: the tensors, and
/// what it keeps for others. `None` on the CPU.
pub fn peak_reserved_gpu_memory(device: Device) -> Option<u64> {
    let Device::Cuda(index) = device else { return None };
    let mut peak = 0i64;
    // SAFETY: the pointer is valid for the call.
    checked(unsafe { cllm_peak_reserved_gpu_memory(c_int::try_from(index).ok()?, &mut peak) }).ok()?;
    u64::try_from(peak).ok()
}

/// Bytes of a GPU that are free, and all that it has. What the driver needs for this process is no
/// longer free. `None` on the CPU.
pub fn gpu_capacity(device: Device) -> Option<(u64, u64)> {
    let Device::Cuda(index) = device else { return None };
    let (mut free, mut total) = (0i64, 0i64);
    // SAFETY: both pointers are valid for the call.
    checked(unsafe { cllm_gpu_capacity(c_int::try_from(index).ok()?, &mut free, &mut total) }).ok()?;
    Some((u64::try_from(free).ok()?, u64::try_from(total).ok()?))
}

/// Runs `body`, and returns with its result the peak of the bytes that tensors on the CPU had which
/// this thread (and backward passes that it started) made meanwhile.
///
/// # Errors
/// [`Error::Torch`] if libtorch cannot count.
pub fn with_peak_cpu_memory<T>(body: impl FnOnce() -> T) -> Result<(T, u64)> {
    // SAFETY: no pointers are passed.
    checked(unsafe { cllm_cpu_memory_begin() })?;
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(body));
    let mut peak = 0i64;
    // SAFETY: the pointer is valid for the call, and the count that it ends was begun above on this
    // thread.
    checked(unsafe { cllm_cpu_memory_end(&mut peak) })?;
    match result {
        Ok(value) => Ok((value, peak as u64)),
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

/// Starts a new measurement of peak memory. Does nothing on the CPU.
pub fn reset_peak_gpu_memory(device: Device) {
    if let Device::Cuda(index) = device {
        // SAFETY: no pointers are passed. A failure only leaves the old peak.
        let _ = unsafe { cllm_reset_peak_gpu_memory(index as c_int) };
    }
}

/// `left [.., k]` times the transpose of `right [n, k]`: float32 `[.., n]`. The product is
/// accumulated *and returned* in float32 even for bfloat16 inputs on a GPU, where a bfloat16 result
/// would turn different logits into ties. No gradient flows through it.
///
/// # Errors
/// [`Error::Torch`] if the shapes do not fit.
pub fn matmul_float32(left: &Tensor, right: &Tensor) -> Result<Tensor> {
    let mut shape = left.size();
    let width = shape.pop().unwrap_or(1);
    let product = mm_float32(&left.f_reshape([-1, width])?, &right.f_tr()?)?;
    shape.push(right.size()[0]);
    Ok(product.f_reshape(shape)?)
}

/// `left [m, k]` times `right [k, n]`, accumulated and returned in float32 whatever their type.
///
/// # Errors
/// [`Error::Torch`] if the shapes do not fit.
pub fn mm_float32(left: &Tensor, right: &Tensor) -> Result<Tensor> {
    if left.device().is_cuda() && left.kind() != Kind::Float {
        return Ok(left.f_mm_dtype(right, Kind::Float)?);
    }
    Ok(left.f_to_kind(Kind::Float)?.f_mm(&right.f_to_kind(Kind::Float)?)?)
}

/// Maps a file into memory, read-only.
///
/// # Errors
/// If it cannot be opened or mapped.
pub fn map_file(path: &Path) -> Result<memmap2::Mmap> {
    let file = File::open(path).map_err(Error::io(path))?;
    // SAFETY: a mapped file must not change. The toolkit never writes to a file in place: it writes
    // a new one and renames it. No caller could vouch for other programs; if one truncates the
    // file, this process ends with SIGBUS.
    unsafe { memmap2::Mmap::map(&file) }.map_err(Error::io(path))
}

/// The raw little-endian bytes of a tensor, copied to the host in its own type.
///
/// # Errors
/// [`Error::Torch`] if the copy fails.
pub fn tensor_to_bytes(tensor: &Tensor) -> Result<Vec<u8>> {
    let tensor = tensor.f_detach()?.f_to(Device::Cpu)?.f_contiguous()?;
    let mut bytes = vec![0u8; tensor.numel() * tensor.kind().elt_size_in_bytes()];
    tensor.f_copy_data_u8(&mut bytes, tensor.numel())?;
    Ok(bytes)
}
