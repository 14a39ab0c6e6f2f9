//! CUDA streams and graphs: a series of kernels is captured once and from then on launched as a
//! unit.

use std::ffi::{c_int, c_void};
use std::sync::{Mutex, PoisonError};

use tch::{Device, Kind, Tensor};

use super::{checked, pointer};
use crate::Result;

unsafe extern "C" {
    fn cllm_stream_new(device: c_int, id: *mut i64) -> c_int;
    fn cllm_stream_current(device: c_int, id: *mut i64) -> c_int;
    fn cllm_stream_set_current(device: c_int, id: i64) -> c_int;
    fn cllm_stream_synchronize(device: c_int, id: i64) -> c_int;
    fn cllm_graph_pool_new(pool: *mut u64) -> c_int;
    fn cllm_graph_capture_begin(pool: *const u64, graph: *mut *mut c_void) -> c_int;
    fn cllm_graph_capture_end(graph: *mut c_void) -> c_int;
    fn cllm_graph_replay(graph: *mut c_void) -> c_int;
    fn cllm_graph_free(graph: *mut c_void);
    fn cllm_pinned_zeros(count: i64, tensor: *mut *mut c_void) -> c_int;
    fn cllm_copy_async(to: *mut c_void, from: *mut c_void) -> c_int;
}

/// Streams that have been dropped, by device. cuBLAS keeps scratch memory (tens of MB) for every
/// stream that it has seen, so they are reused.
static FREE: Mutex<Vec<(c_int, i64)>> = Mutex::new(Vec::new());

/// A CUDA stream other than the device's default one. Nobody else uses it while it lives.
#[derive(Debug)]
pub(super) struct Stream {
    device: c_int,
    id: i64,
}

impl Stream {
    /// A dropped stream if there is one, else one of libtorch's pool of 32.
    ///
    /// # Errors
    /// [`crate::Error::Torch`] if there is no such device; here and below.
    pub(super) fn new(device: usize) -> Result<Self> {
        let device = device as c_int;
        let mut free = FREE.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(index) = free.iter().position(|&(owner, _)| owner == device) {
            return Ok(Stream { device, id: free.swap_remove(index).1 });
        }
        let mut id = 0;
        // SAFETY: the pointer is valid for the call.
        checked(unsafe { cllm_stream_new(device, &mut id) })?;
        Ok(Stream { device, id })
    }

    /// Makes the stream this thread's current one until the guard is dropped.
    pub(super) fn enter(&self) -> Result<OnStream> {
        let mut previous = 0;
        // SAFETY: the pointer is valid for the call, and the id is a stream's.
        unsafe {
            checked(cllm_stream_current(self.device, &mut previous))?;
            checked(cllm_stream_set_current(self.device, self.id))?;
        }
        Ok(OnStream { device: self.device, previous })
    }

    /// Waits until all work on the stream is done. Returns the error of that work, if it failed.
    pub(super) fn synchronize(&self) -> Result<()> {
        // SAFETY: the id is a stream's.
        checked(unsafe { cllm_stream_synchronize(self.device, self.id) })
    }

    /// Captures what `work` puts on the stream, which this thread must have entered. Nothing runs
    /// yet. It fails if `work` does what cannot be captured, such as waiting for the device.
    pub(super) fn record<T>(&self, pool: &GraphPool, work: impl FnOnce() -> Result<T>) -> Result<(Graph, T)> {
        let mut handle = std::ptr::null_mut();
        // SAFETY: the pool's two numbers and the handle are valid for the call.
        unsafe { checked(cllm_graph_capture_begin(pool.id.as_ptr(), &mut handle))? };
        let graph = Graph { handle };
        let result = work();
        // SAFETY: the capture has begun. It ends even if `work` failed, or the stream would stay in
        // capture mode.
        let ended = checked(unsafe { cllm_graph_capture_end(graph.handle) });
        let value = result?;
        ended?;
        Ok((graph, value))
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        FREE.lock().unwrap_or_else(PoisonError::into_inner).push((self.device, self.id));
    }
}

/// While it lives, this thread's work for the device goes to the stream that was entered.
#[derive(Debug)]
pub(super) struct OnStream {
    device: c_int,
    previous: i64,
}

impl Drop for OnStream {
    fn drop(&mut self) {
        // SAFETY: the id is that of the stream that was current before. If this fails, work stays
        // on the other stream.
        let _ = unsafe { cllm_stream_set_current(self.device, self.previous) };
    }
}

/// Waits until all work that this thread gave to a GPU is done; the CPU has none. Unlike waiting
/// for the whole device, this does not disturb captures of other threads.
///
/// # Errors
/// [`crate::Error::Torch`] with the error of that work.
pub fn synchronize_current_stream(device: Device) -> Result<()> {
    let Device::Cuda(index) = device else { return Ok(()) };
    let (device, mut id) = (index as c_int, 0);
    // SAFETY: the pointer is valid for the call, and the id is a stream's.
    unsafe {
        checked(cllm_stream_current(device, &mut id))?;
        checked(cllm_stream_synchronize(device, id))
    }
}

/// Memory that graphs share if they never run at the same time. It is freed with the last of them;
/// graphs that are captured later need another pool.
#[derive(Debug)]
pub(super) struct GraphPool {
    id: [u64; 2],
}

impl GraphPool {
    pub(super) fn new() -> Result<Self> {
        let mut id = [0; 2];
        // SAFETY: the array has room for both numbers.
        checked(unsafe { cllm_graph_pool_new(id.as_mut_ptr()) })?;
        Ok(GraphPool { id })
    }
}

/// A captured series of kernels.
#[derive(Debug)]
pub(super) struct Graph {
    handle: *mut c_void,
}

impl Graph {
    /// Puts the captured work on the current stream.
    ///
    /// # Safety
    /// Every tensor that the work used during the capture is still alive at the same address, and
    /// those that kernels read as indices will hold valid ones when they do. A capture that failed
    /// is not replayed.
    pub(super) unsafe fn replay(&self) -> Result<()> {
        // SAFETY: the caller vouches for the memory that the graph uses.
        checked(unsafe { cllm_graph_replay(self.handle) })
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: nobody else has the handle.
        unsafe { cllm_graph_free(self.handle) };
    }
}

/// int32 numbers in pinned host memory, which a device reads and writes by itself.
#[derive(Debug)]
pub(super) struct PinnedInts {
    tensor: Tensor,
}

impl PinnedInts {
    /// Allocates `length` zeros.
    ///
    /// # Errors
    /// [`crate::Error::Torch`] if memory runs out or there is no CUDA device.
    pub(super) fn new(length: usize) -> Result<Self> {
        Ok(PinnedInts { tensor: pinned_zeros(length)? })
    }

    /// # Safety
    /// No copy that [`Self::send`] or [`Self::receive`] started, or that a graph repeats, is under
    /// way while the slice lives.
    pub(super) unsafe fn as_mut_slice(&mut self) -> &mut [i32] {
        // SAFETY: the tensor is a contiguous int32 tensor of the host, borrowed for as long as the
        // slice.
        unsafe { std::slice::from_raw_parts_mut(self.tensor.data_ptr().cast(), self.tensor.numel()) }
    }

    /// Starts a copy of the leading numbers to a tensor.
    ///
    /// # Errors
    /// [`crate::Error::Torch`] if the tensor is longer.
    pub(super) fn send(&self, to: &Tensor) -> Result<()> {
        copy_async(to, &self.tensor.f_narrow(0, 0, to.numel() as i64)?)
    }

    /// Starts a copy of a tensor over the leading numbers.
    ///
    /// # Errors
    /// [`crate::Error::Torch`] if the tensor is longer.
    pub(super) fn receive(&self, from: &Tensor) -> Result<()> {
        copy_async(&self.tensor.f_narrow(0, 0, from.numel() as i64)?, from)
    }
}

/// int32 zeros `[length]` in pinned host memory.
///
/// # Errors
/// [`crate::Error::Torch`] if memory runs out or there is no CUDA device.
pub(super) fn pinned_zeros(length: usize) -> Result<Tensor> {
    let mut tensor = std::ptr::null_mut();
    // SAFETY: on success `tensor` is a tensor that this side owns.
    unsafe {
        checked(cllm_pinned_zeros(length as i64, &mut tensor))?;
        Ok(Tensor::from_ptr(tensor.cast()))
    }
}

/// Starts a copy of numbers to a new int32 tensor of a device. CUDA has read them when this returns.
///
/// # Errors
/// [`crate::Error::Torch`] if memory runs out.
pub(super) fn sent(ints: &[i32], device: Device) -> Result<Tensor> {
    let to = Tensor::f_empty([ints.len() as i64], (Kind::Int, device))?;
    copy_async(&to, &Tensor::f_from_slice(ints)?)?;
    Ok(to)
}

fn copy_async(to: &Tensor, from: &Tensor) -> Result<()> {
    // SAFETY: both are valid tensors for the length of the call.
    checked(unsafe { cllm_copy_async(pointer(to), pointer(from)) })
}
