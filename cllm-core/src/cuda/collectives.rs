//! Collectives of processes that train together: those of PyTorch's c10d (csrc/distributed.cpp).
//!
//! Each process checks its own tensors. Whether all processes call the same function with tensors of
//! the same size cannot be checked here. If they do not, c10d reports an error or waits until its
//! timeout, but no process touches memory outside its own tensors.

use std::ffi::{c_int, c_void};
use std::time::Duration;

use tch::{Device, Tensor};

use super::store::Store;
use super::{checked, pointer};
use crate::{Error, Result};

unsafe extern "C" {
    fn cllm_group_new(
        store: *mut c_void,
        rank: c_int,
        world_size: c_int,
        gpu: c_int,
        timeout_ms: i64,
        group: *mut *mut c_void,
    ) -> c_int;
    fn cllm_group_all_reduce(group: *mut c_void, values: *mut c_void) -> c_int;
    fn cllm_group_reduce_scatter(group: *mut c_void, output: *mut c_void, input: *mut c_void) -> c_int;
    fn cllm_group_reduce(group: *mut c_void, values: *mut c_void, root: c_int, work: *mut *mut c_void) -> c_int;
    fn cllm_work_wait(work: *mut c_void) -> c_int;
    fn cllm_work_free(work: *mut c_void);
    fn cllm_group_all_gather(group: *mut c_void, output: *mut c_void, input: *mut c_void) -> c_int;
    fn cllm_group_broadcast(group: *mut c_void, values: *mut c_void, root: c_int) -> c_int;
    fn cllm_group_free(group: *mut c_void);
}

/// A group of processes, over NCCL on GPUs and Gloo on CPUs. Every process calls the same functions
/// in the same order, with contiguous tensors of the same size and type on the group's device. With
/// NCCL they return at once, and the device's current stream waits.
pub struct Collectives {
    handle: *mut c_void,
    world_size: usize,
    /// Device that tensors must be on.
    device: Device,
}

impl Collectives {
    /// Joins the other processes at the store; the group keeps this connection to it. `gpu` is the
    /// index of the GPU for NCCL, or `None` for Gloo.
    ///
    /// # Errors
    /// [`Error::Torch`] if the others do not join in time.
    pub fn new(store: &Store, rank: usize, world_size: usize, gpu: Option<usize>, timeout: Duration) -> Result<Self> {
        let mut handle = std::ptr::null_mut();
        let (gpu_index, timeout_ms) = (gpu.map_or(-1, |index| index as c_int), timeout.as_millis() as i64);
        // SAFETY: the store is valid. On success the group belongs to this side.
        checked(unsafe {
            cllm_group_new(store.handle, rank as c_int, world_size as c_int, gpu_index, timeout_ms, &mut handle)
        })?;
        Ok(Collectives { handle, world_size, device: gpu.map_or(Device::Cpu, Device::Cuda) })
    }

    /// Waits until every process has called this, and frees the group. A group that is only dropped
    /// is never freed: after an error, the others do not come.
    pub fn free(self) {
        // SAFETY: the group was made by `cllm_group_new`, and nothing uses it after this.
        unsafe { cllm_group_free(self.handle) }
    }

    /// Replaces `values` with their sum over all processes.
    ///
    /// # Errors
    /// [`Error::Internal`] for a tensor that does not fit, else [`Error::Torch`], for example if
    /// another process has ended; here and below.
    pub fn all_reduce(&self, values: &Tensor) -> Result<()> {
        self.check(values, values, values.numel())?;
        // SAFETY: the group and the tensors are valid and fit each other; here and below.
        checked(unsafe { cllm_group_all_reduce(self.handle, pointer(values)) })
    }

    /// `output [count]` = this process's shard of the sum over all processes of `input [world_size
    /// x count]`.
    pub fn reduce_scatter(&self, output: &Tensor, input: &Tensor) -> Result<()> {
        self.check(output, input, output.numel() * self.world_size)?;
        checked(unsafe { cllm_group_reduce_scatter(self.handle, pointer(output), pointer(input)) })
    }

    /// Starts to make `values` of process `root` the sum over all processes; in the others they
    /// become anything.
    pub fn start_reduce(&self, values: &Tensor, root: usize) -> Result<Work> {
        self.check(values, values, values.numel())?;
        let mut handle = std::ptr::null_mut();
        checked(unsafe { cllm_group_reduce(self.handle, pointer(values), root as c_int, &mut handle) })?;
        Ok(Work { handle })
    }

    /// `output [world_size x count]` = the `input [count]` of every process.
    pub fn all_gather(&self, output: &Tensor, input: &Tensor) -> Result<()> {
        self.check(input, output, input.numel() * self.world_size)?;
        checked(unsafe { cllm_group_all_gather(self.handle, pointer(output), pointer(input)) })
    }

    /// Replaces `values` with those of process `root`.
    pub fn broadcast(&self, values: &Tensor, root: usize) -> Result<()> {
        self.check(values, values, values.numel())?;
        checked(unsafe { cllm_group_broadcast(self.handle, pointer(values), root as c_int) })
    }

    /// Fails unless both tensors suit the group and `whole` has this number of elements.
    fn check(&self, shard: &Tensor, whole: &Tensor, num_elements: usize) -> Result<()> {
        let is_valid = |x: &Tensor| x.is_contiguous() && x.device() == self.device && x.kind() == shard.kind();
        if is_valid(shard) && is_valid(whole) && whole.numel() == num_elements {
            return Ok(());
        }
        let sizes = format!("{:?} and {:?}", shard.size(), whole.size());
        Err(Error::internal(format!("tensors {sizes} do not suit a collective of {} processes", self.world_size)))
    }
}

/// A collective that has begun. c10d keeps its tensors alive.
pub struct Work {
    handle: *mut c_void,
}

impl Work {
    /// Waits for the collective: with NCCL the device's current stream, with Gloo the thread.
    ///
    /// # Errors
    /// [`Error::Torch`], for example if another process has ended.
    pub fn wait(self) -> Result<()> {
        // SAFETY: the work is valid; here and below.
        checked(unsafe { cllm_work_wait(self.handle) })
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        // SAFETY: it was made by a function of csrc/ and is freed once.
        unsafe { cllm_work_free(self.handle) }
    }
}
