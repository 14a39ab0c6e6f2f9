//! Names of devices: `auto`, `cpu`, `cuda`, `cuda:N`.

use tch::{Cuda, Device, Kind};

use crate::distributed::ProcessEnv;
use crate::{Error, Result};

/// The device that `name` means on this machine; `auto` is the first GPU, or the CPU where there is none.
///
/// # Errors
/// [`Error::Usage`] for a name that is none, [`Error::Environment`] for a GPU that is not there.
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
    let count = if Cuda::is_available() { Cuda::device_count() } else { 0 };
    if (index as i64) < count {
        Ok(Device::Cuda(index))
    } else if count == 0 {
        Err(Error::environment(format!(
            "device `{name}`: libtorch sees no CUDA device here; use device=cpu, or see `cllm-eval doctor`"
        )))
    } else {
        Err(Error::environment(format!("device `{name}`: this machine has cuda:0 to cuda:{}", count - 1)))
    }
}

/// The device of one of several processes: where `name` leaves the GPU open, the one of its number on this machine.
///
/// # Errors
/// As [`parse`].
pub fn for_process(name: &str, process: Option<&ProcessEnv>) -> Result<Device> {
    match process {
        // Some launchers show each process its own GPU alone.
        Some(_) if Cuda::device_count() == 1 => parse(name),
        Some(process) if ["auto", "cuda"].contains(&name) && Cuda::is_available() => {
            parse(&format!("cuda:{}", process.local_rank))
        }
        _ => parse(name),
    }
}

/// What models compute in on a device: bf16 on GPUs, float32 on CPUs.
pub fn default_kind(device: Device) -> Kind {
    if device.is_cuda() { Kind::BFloat16 } else { Kind::Float }
}

/// Waits until the device has done all work given to it; for timings.
pub fn synchronize(device: Device) {
    if let Device::Cuda(index) = device {
        Cuda::synchronize(index as i64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_checked() {
        assert_eq!(parse("cpu").unwrap(), Device::Cpu);
        assert!(matches!(parse("gpu"), Err(Error::Usage(_))));
        assert!(matches!(parse("cuda:4096"), Err(Error::Environment(_))));
    }
}
