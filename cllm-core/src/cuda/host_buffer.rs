//! Memory of the host through which tensors travel between a device and files.

use tch::{Device, Kind, Tensor};

use super::graphs::pinned_zeros;
use crate::{Error, Result};

/// Bytes in host memory, pinned for a GPU, which copies to and from pinned memory several times as
/// fast.
pub struct HostBuffer {
    /// uint8 `[bytes]`. No other tensor shares its memory, except while a method runs.
    tensor: Tensor,
}

impl HostBuffer {
    /// A buffer of zeros for tensors of `device`.
    ///
    /// # Errors
    /// [`Error::Torch`] when memory runs out, here and below.
    pub fn new(num_bytes: usize, device: Device) -> Result<Self> {
        let tensor = if device.is_cuda() {
            pinned_zeros(num_bytes.div_ceil(4))?.f_view_dtype(Kind::Uint8)?
        } else {
            Tensor::f_zeros([num_bytes as i64], (Kind::Uint8, Device::Cpu))?
        };
        Ok(HostBuffer { tensor })
    }

    pub fn as_slice(&self) -> &[u8] {
        // SAFETY: the tensor is contiguous, initialized and on the host. The slice borrows the
        // buffer, and every change of the memory needs it mutably.
        unsafe { std::slice::from_raw_parts(self.tensor.data_ptr().cast(), self.tensor.numel()) }
    }

    /// Copies a tensor in its own type to the bytes from `start` on, a multiple of its element size,
    /// and waits for the copy.
    ///
    /// # Errors
    /// [`Error::Internal`] for a tensor that does not fit, here and below.
    pub fn receive(&mut self, start: usize, tensor: &Tensor) -> Result<()> {
        Ok(self.view(start, tensor.numel(), tensor.kind())?.f_copy_(&tensor.f_reshape([-1])?)?)
    }

    /// Copies the leading numbers of the buffer, which have type `kind`, to a contiguous tensor of
    /// any type, and waits for the copy.
    pub fn send(&self, tensor: &Tensor, kind: Kind) -> Result<()> {
        Ok(tensor.f_view([-1])?.f_copy_(&self.view(0, tensor.numel(), kind)?)?)
    }

    /// Numbers of type `kind` from byte `start` on, in the same memory.
    fn view(&self, start: usize, num_elements: usize, kind: Kind) -> Result<Tensor> {
        let num_bytes = num_elements * kind.elt_size_in_bytes();
        if start + num_bytes > self.tensor.numel() || !start.is_multiple_of(kind.elt_size_in_bytes()) {
            let message = format!("{num_bytes} bytes do not fit at {start} of a buffer of {}", self.tensor.numel());
            return Err(Error::internal(message));
        }
        Ok(self.tensor.f_narrow(0, start as i64, num_bytes as i64)?.f_view_dtype(kind)?)
    }
}

impl AsMut<[u8]> for HostBuffer {
    fn as_mut(&mut self) -> &mut [u8] {
        // SAFETY: as for `as_slice`; the slice borrows the buffer mutably.
        unsafe { std::slice::from_raw_parts_mut(self.tensor.data_ptr().cast(), self.tensor.numel()) }
    }
}
