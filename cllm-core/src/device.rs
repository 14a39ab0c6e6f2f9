//! Devices by name: `auto`, `cpu`, `cuda`, `cuda:N`.

use tch::kind::Element;
use tch::{Cuda, Device, Kind, Tensor};

use crate::cuda::libtorch::pin_memory;
use crate::distributed::ProcessEnv;
use crate::{Error, Result};

/// Checks the name of a device, which this machine may lack.
///
/// # Errors
/// [`Error::Usage`] for an unknown name.
pub fn check_name(name: &str) -> Result<()> {
    match parse(name) {
        Err(unknown @ Error::Usage(_)) => Err(unknown),
        _ => Ok(()),
    }
}

/// Parses the name of a device; `auto` is the first GPU, or the CPU on a machine without GPUs.
///
/// # Errors
/// [`Error::Usage`] for an unknown name, [`Error::Environment`] for a GPU that this machine lacks.
pub fn parse(name: &str) -> Result<Device> {
    let index = match name {
        "cpu" => return Ok(Device::Cpu),
        "auto" if !Cuda::is_available() => return Ok(Device::Cpu),
        "auto" | "cuda" => 0,
        _ => name
            .strip_prefix("cuda:")
            .and_then(|index| index.parse().ok())
            .ok_or_else(|| Error::usage(format!("device `{name}` is unknown: use auto, cpu, cuda or cuda:N")))?,
    };
    let num_gpus = if Cuda::is_available() { Cuda::device_count() } else { 0 };
    if (index as i64) < num_gpus {
        Ok(Device::Cuda(index))
    } else if num_gpus == 0 {
        Err(Error::environment(format!(
            "device `{name}`: libtorch sees no CUDA device here; use device=cpu, or see `cllm-eval doctor`"
        )))
    } else {
        Err(Error::environment(format!("device `{name}`: this machine has cuda:0 to cuda:{}", num_gpus - 1)))
    }
}

/// The device of one process of a distributed run. If `name` does not say which GPU, the process's
/// local rank does.
///
/// # Errors
/// As [`parse`].
pub fn for_process(name: &str, process: Option<&ProcessEnv>) -> Result<Device> {
    match process {
        // Some launchers let each process see only its own GPU.
        Some(_) if Cuda::device_count() == 1 => parse(name),
        Some(process) if ["auto", "cuda"].contains(&name) && Cuda::is_available() => {
            parse(&format!("cuda:{}", process.local_rank))
        }
        _ => parse(name),
    }
}

/// The type that models compute in: bf16 on GPUs, float32 on CPUs.
pub fn default_kind(device: Device) -> Kind {
    if device.is_cuda() { Kind::BFloat16 } else { Kind::Float }
}

/// Copies numbers to a device, `[values]`. The host does not wait for what a GPU still has to do.
///
/// # Errors
/// [`Error::Torch`], for instance when memory runs out.
pub fn upload<T: Element>(values: &[T], device: Device) -> Result<Tensor> {
    let tensor = Tensor::f_from_slice(values)?;
    if !device.is_cuda() || values.is_empty() {
        return Ok(tensor.f_to_device(device)?);
    }
    // From pinned memory, which libtorch keeps until the copy is done.
    Ok(pin_memory(&tensor)?.f_to_device_(device, T::KIND, true, false)?)
}

/// Waits until the device has finished all its work, for timings.
pub fn synchronize(device: Device) {
    if let Device::Cuda(index) = device {
        Cuda::synchronize(index as i64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_keep_their_type_and_order() {
        let uploaded = upload(&[3i32, 1, 2], Device::Cpu).unwrap();
        assert_eq!((uploaded.kind(), Vec::<i32>::try_from(&uploaded).unwrap()), (Kind::Int, vec![3, 1, 2]));
        assert_eq!(upload::<i64>(&[], Device::Cpu).unwrap().size(), [0]);
    }

    #[test]
    fn unknown_and_missing_devices_are_refused() {
        assert_eq!(parse("cpu").unwrap(), Device::Cpu);
        assert!(matches!(parse("gpu"), Err(Error::Usage(_))));
        assert!(matches!(parse("cuda:4096"), Err(Error::Environment(_))));
    }
}
