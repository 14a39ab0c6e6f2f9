//! CUDA streams and graphs: a step is recorded once and then launched as one piece of work.

use std::ffi::{c_int, c_void};
use std::sync::{Mutex, PoisonError};

use tch::{Device, Tensor};

use super::checked;
use crate::Result;

unsafe extern "C" {
    fn cllm_stream_new(device: c_int, id: *mut i64) -> c_int;
    fn cllm_stream_current(device: c_int, id: *mut i64) -> c_int;
    fn cllm_stream_set(device: c_int, id: i64) -> c_int;
    fn cllm_stream_synchronize(device: c_int, id: i64) -> c_int;
    fn cllm_graph_pool(pool: *mut u64) -> c_int;
    fn cllm_graph_begin(pool: *const u64, graph: *mut *mut c_void) -> c_int;
    fn cllm_graph_end(graph: *mut c_void) -> c_int;
    fn cllm_graph_replay(graph: *mut c_void) -> c_int;
    fn cllm_graph_free(graph: *mut c_void);
    fn cllm_pinned_ints(count: i64, tensor: *mut *mut c_void) -> c_int;
    fn cllm_copy_async(to: *mut c_void, from: *mut c_void) -> c_int;
}

/// Streams of libtorch's pool that nobody has any more. Each has scratch memory of cuBLAS for good (tens of MB), so they are taken again
/// before new ones: else every decoder would leave some behind.
static FREE: Mutex<Vec<(c_int, i64)>> = Mutex::new(Vec::new());

/// A stream of a CUDA device beside the default one, nobody else's while it lives.
#[derive(Debug)]
pub struct Stream {
    device: c_int,
    id: i64,
}

/// Memory that graphs share which never run at once. It is gone with the last of them: those recorded later need another.
#[derive(Debug)]
pub struct GraphPool {
    id: [u64; 2],
}

/// While it lives, this thread's work for the device goes to the stream.
#[derive(Debug)]
pub struct OnStream {
    device: c_int,
    before: i64,
}

/// Recorded work. It reads and writes the very tensors that were there when it was recorded.
#[derive(Debug)]
pub struct Graph {
    handle: *mut c_void,
}

impl Stream {
    /// A stream of libtorch's pool, of which there are 32: those of decoders that are gone come first.
    ///
    /// # Errors
    /// [`crate::Error::Torch`] where there is no such device.
    pub fn new(device: usize) -> Result<Self> {
        let device = device as c_int;
        let mut free = FREE.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(at) = free.iter().position(|&(of, _)| of == device) {
            return Ok(Stream { device, id: free.swap_remove(at).1 });
        }
        let mut id = 0;
        // SAFETY: the pointer is valid for the call.
        checked(unsafe { cllm_stream_new(device, &mut id) })?;
        Ok(Stream { device, id })
    }

    /// Sends this thread's work to the stream until the guard is dropped.
    ///
    /// # Errors
    /// [`crate::Error::Torch`].
    pub fn enter(&self) -> Result<OnStream> {
        let mut before = 0;
        // SAFETY: the pointer is valid for the call and the id is a stream's.
        unsafe {
            checked(cllm_stream_current(self.device, &mut before))?;
            checked(cllm_stream_set(self.device, self.id))?;
        }
        Ok(OnStream { device: self.device, before })
    }

    /// Waits until all work given to the stream is done.
    ///
    /// # Errors
    /// [`crate::Error::Torch`] with what that work failed with.
    pub fn synchronize(&self) -> Result<()> {
        // SAFETY: the id is a stream's.
        checked(unsafe { cllm_stream_synchronize(self.device, self.id) })
    }

    /// Records what `work` puts on the stream, which this thread must have entered. Nothing runs yet.
    ///
    /// # Errors
    /// What `work` fails with; [`crate::Error::Torch`] when it does what cannot be recorded, such as waiting.
    pub fn record<T>(&self, pool: &GraphPool, work: impl FnOnce() -> Result<T>) -> Result<(Graph, T)> {
        let mut handle = std::ptr::null_mut();
        // SAFETY: the pool's two numbers and the handle are valid for the calls; the graph is ended before it is used.
        unsafe { checked(cllm_graph_begin(pool.id.as_ptr(), &mut handle))? };
        let graph = Graph { handle };
        let made = work();
        // SAFETY: as above. Ended in any case, or the stream would stay in recording.
        let ended = checked(unsafe { cllm_graph_end(graph.handle) });
        let made = made?;
        ended?;
        Ok((graph, made))
    }
}

/// Waits until all work that this thread gave to a GPU is done; CPUs have done it. Waiting for the whole device would break what
/// other threads record meanwhile.
///
/// # Errors
/// [`crate::Error::Torch`] with what that work failed with.
pub fn synchronize_current_stream(device: Device) -> Result<()> {
    let Device::Cuda(index) = device else { return Ok(()) };
    let (device, mut id) = (index as c_int, 0);
    // SAFETY: the pointer is valid for the call and the id is a stream's.
    unsafe {
        checked(cllm_stream_current(device, &mut id))?;
        checked(cllm_stream_synchronize(device, id))
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        FREE.lock().unwrap_or_else(PoisonError::into_inner).push((self.device, self.id));
    }
}

impl GraphPool {
    /// A pool without memory.
    ///
    /// # Errors
    /// [`crate::Error::Torch`].
    pub fn new() -> Result<Self> {
        let mut id = [0; 2];
        // SAFETY: the array has room for both numbers.
        checked(unsafe { cllm_graph_pool(id.as_mut_ptr()) })?;
        Ok(GraphPool { id })
    }
}

impl Drop for OnStream {
    fn drop(&mut self) {
        // SAFETY: the id is that of the stream that was current before. A failure leaves the work on the other stream.
        let _ = unsafe { cllm_stream_set(self.device, self.before) };
    }
}

impl Graph {
    /// Puts the recorded work on the current stream.
    ///
    /// # Errors
    /// [`crate::Error::Torch`].
    pub fn replay(&self) -> Result<()> {
        // SAFETY: the graph was recorded whole.
        checked(unsafe { cllm_graph_replay(self.handle) })
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: the handle is this side's own.
        unsafe { cllm_graph_free(self.handle) };
    }
}

/// Numbers in memory of the host that a device copies from and to without the host's help.
#[derive(Debug)]
pub struct PinnedInts {
    tensor: Tensor,
}

impl PinnedInts {
    /// So many zeros.
    ///
    /// # Errors
    /// [`crate::Error::Torch`] when memory runs out, or without a CUDA device.
    pub fn new(length: usize) -> Result<Self> {
        let mut tensor = std::ptr::null_mut();
        // SAFETY: on success `tensor` is a tensor that this side owns.
        unsafe {
            checked(cllm_pinned_ints(length as i64, &mut tensor))?;
            Ok(PinnedInts { tensor: Tensor::from_ptr(tensor.cast()) })
        }
    }

    /// The numbers. They must not be touched while a copy is under way: wait for the stream first.
    pub fn as_mut_slice(&mut self) -> &mut [i32] {
        // SAFETY: the tensor is a contiguous int32 tensor of the host, borrowed for as long as the slice.
        unsafe { std::slice::from_raw_parts_mut(self.tensor.data_ptr().cast(), self.tensor.numel()) }
    }

    /// Begins to copy the leading numbers to a tensor.
    ///
    /// # Errors
    /// [`crate::Error::Torch`].
    pub fn send(&self, to: &Tensor) -> Result<()> {
        copy_async(to, &self.tensor.f_narrow(0, 0, to.numel() as i64)?)
    }

    /// Begins to copy a tensor over the leading numbers.
    ///
    /// # Errors
    /// [`crate::Error::Torch`].
    pub fn receive(&self, from: &Tensor) -> Result<()> {
        copy_async(&self.tensor.f_narrow(0, 0, from.numel() as i64)?, from)
    }
}

fn copy_async(to: &Tensor, from: &Tensor) -> Result<()> {
    // SAFETY: both are valid tensors for the length of the call.
    checked(unsafe { cllm_copy_async(to.as_ptr().cast_mut().cast(), from.as_ptr().cast_mut().cast()) })
}
