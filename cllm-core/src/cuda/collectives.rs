//! c10d's collectives (csrc/distributed.cpp).

use std::ffi::{CString, c_char, c_int, c_void};
use std::time::Duration;

use tch::Tensor;

use super::{checked, pointer};
use crate::{Error, Result};

unsafe extern "C" {
    fn cllm_group_new(
        host: *const c_char,
        port: c_int,
        serves: c_int,
        prefix: *const c_char,
        rank: c_int,
        world: c_int,
        device: c_int,
        timeout_ms: i64,
        group: *mut *mut c_void,
    ) -> c_int;
    fn cllm_group_all_reduce(group: *mut c_void, values: *mut c_void) -> c_int;
    fn cllm_group_reduce_scatter(group: *mut c_void, output: *mut c_void, input: *mut c_void) -> c_int;
    fn cllm_group_all_gather(group: *mut c_void, output: *mut c_void, input: *mut c_void) -> c_int;
    fn cllm_group_broadcast(group: *mut c_void, values: *mut c_void, root: c_int) -> c_int;
    fn cllm_group_free(group: *mut c_void);
}

/// Where the processes of a group find one another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rendezvous {
    /// Name or address of the machine that keeps the store.
    pub host: String,
    /// Its port.
    pub port: u16,
    /// Whether this process keeps the store itself.
    pub serves: bool,
    /// Of the store's keys.
    pub prefix: String,
}

/// A group of processes; NCCL on a GPU, Gloo on the CPU. Every process of the group calls the same functions in the same order,
/// with tensors of the same shape and type, contiguous on the group's device. With NCCL they return at once, and the device's
/// current stream waits.
pub struct Collectives(*mut c_void);

impl Collectives {
    /// Meets the other processes. `gpu`: the GPU of NCCL, none for Gloo.
    ///
    /// # Errors
    /// [`Error::Torch`] where the store cannot be reached in time.
    pub fn new(
        rendezvous: &Rendezvous,
        rank: usize,
        world: usize,
        gpu: Option<usize>,
        timeout: Duration,
    ) -> Result<Self> {
        let c_string = |text: &str| {
            CString::new(text).map_err(|_| Error::usage(format!("`{text}` holds a zero byte, as no address does")))
        };
        let (host, prefix) = (c_string(&rendezvous.host)?, c_string(&rendezvous.prefix)?);
        let mut group = std::ptr::null_mut();
        // SAFETY: the strings outlive the call; on success `group` is this side's to free.
        checked(unsafe {
            cllm_group_new(
                host.as_ptr(),
                c_int::from(rendezvous.port),
                c_int::from(rendezvous.serves),
                prefix.as_ptr(),
                rank as c_int,
                world as c_int,
                gpu.map_or(-1, |index| index as c_int),
                timeout.as_millis() as i64,
                &mut group,
            )
        })?;
        Ok(Collectives(group))
    }

    /// The sum over all processes, in place.
    ///
    /// # Errors
    /// [`Error::Torch`], here and below, such as a process that is gone.
    pub fn all_reduce(&self, values: &Tensor) -> Result<()> {
        // SAFETY: both are valid, here and below.
        checked(unsafe { cllm_group_all_reduce(self.0, pointer(values)) })
    }

    /// `output [count]` = this process's part of the sum over all processes of `input [world x count]`.
    pub fn reduce_scatter(&self, output: &Tensor, input: &Tensor) -> Result<()> {
        checked(unsafe { cllm_group_reduce_scatter(self.0, pointer(output), pointer(input)) })
    }

    /// `output [world x count]` = the `input [count]` of every process.
    pub fn all_gather(&self, output: &Tensor, input: &Tensor) -> Result<()> {
        checked(unsafe { cllm_group_all_gather(self.0, pointer(output), pointer(input)) })
    }

    /// The values of process `root`, in place.
    pub fn broadcast(&self, values: &Tensor, root: usize) -> Result<()> {
        checked(unsafe { cllm_group_broadcast(self.0, pointer(values), root as c_int) })
    }
}

impl Drop for Collectives {
    fn drop(&mut self) {
        // SAFETY: it was made by `cllm_group_new` and is freed once.
        unsafe { cllm_group_free(self.0) }
    }
}
