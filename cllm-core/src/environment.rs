//! What machine the figures come from.

use std::path::PathBuf;
use std::process::Command;

use serde::{Deserialize, Serialize};
use tch::Device;

/// The machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hardware {
    /// `cpu` or `cuda:N`.
    pub device: String,
    /// Name of the GPU that was used.
    pub gpu: Option<String>,
    /// Model name of the processor.
    pub cpu: String,
    /// Processors that this process may use.
    pub cores: usize,
    /// Threads that libtorch uses for one operation.
    pub threads: i64,
    /// Type of weights and activations.
    pub dtype: String,
}

/// A GPU as its driver names it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Gpu {
    /// Its name.
    pub name: String,
    /// Its memory as the driver writes it.
    pub memory: String,
}

/// Versions that the figures come from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Toolkit {
    /// Of this toolkit.
    pub version: String,
    /// Of libtorch.
    pub libtorch: Option<String>,
}

impl Toolkit {
    /// Those of this process.
    pub fn current() -> Self {
        Toolkit { version: crate::VERSION.to_owned(), libtorch: libtorch_version() }
    }
}

impl Hardware {
    /// This machine, when `device` is used.
    pub fn detect(device: Device) -> Self {
        let (name, gpu) = match device {
            Device::Cuda(index) => (format!("cuda:{index}"), gpus().into_iter().nth(index).map(|gpu| gpu.name)),
            _ => ("cpu".to_owned(), None),
        };
        let dtype = if device.is_cuda() { "bfloat16" } else { "float32" };
        let threads = i64::from(tch::get_num_threads());
        Hardware { device: name, gpu, cpu: cpu_name(), cores: cores(), threads, dtype: dtype.to_owned() }
    }

    /// In one line.
    pub fn summary(&self) -> String {
        let gpu = self.gpu.as_ref().map(|name| format!("{name}; ")).unwrap_or_default();
        format!("{}: {gpu}{}, {} cores, {} threads, {}", self.device, self.cpu, self.cores, self.threads, self.dtype)
    }
}

/// Processors that this process may use.
pub fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Model name of the processor.
pub fn cpu_name() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    text.lines()
        .find(|line| line.starts_with("model name"))
        .and_then(|line| line.split_once(':'))
        .map_or_else(|| std::env::consts::ARCH.to_owned(), |(_, name)| name.trim().to_owned())
}

/// The GPUs that the NVIDIA driver names; none where there is no driver.
pub fn gpus() -> Vec<Gpu> {
    let output = Command::new("nvidia-smi").args(["--query-gpu=name,memory.total", "--format=csv,noheader"]).output();
    let Ok(output) = output else { return Vec::new() };
    if !output.status.success() {
        return Vec::new();
    }
    String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter_map(|line| line.split_once(','))
        .map(|(name, memory)| Gpu { name: name.trim().to_owned(), memory: memory.trim().to_owned() })
        .collect()
}

/// The folder of the libtorch libraries that this process has loaded.
pub fn libtorch_folder() -> Option<PathBuf> {
    let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
    let line = maps.lines().find(|line| line.ends_with("libtorch_cpu.so"))?;
    Some(PathBuf::from(&line[line.find('/')?..]).parent()?.to_owned())
}

/// Version of the loaded libtorch, as its own files give it.
pub fn libtorch_version() -> Option<String> {
    let root = libtorch_folder()?.parent()?.to_owned();
    if let Ok(text) = std::fs::read_to_string(root.join("version.py")) {
        let line = text.lines().find(|line| line.starts_with("__version__"))?;
        return Some(line.split('\'').nth(1)?.to_owned());
    }
    std::fs::read_to_string(root.join("build-version")).ok().map(|text| text.trim().to_owned())
}
