//! The machine and the versions that a measurement comes from. They are saved with every result,
//! since a speed means nothing without them.

use std::path::PathBuf;
use std::process::Command;

use serde::{Deserialize, Serialize};
use tch::Device;

use crate::gpus::GpuModel;
use crate::progress::count;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hardware {
    /// `cpu` or `cuda:N`.
    pub device: String,
    /// Model name of the GPU that was used, null on the CPU.
    pub gpu: Option<String>,
    /// Model name of the processor.
    pub cpu: String,
    /// Processors that this process may use.
    pub cores: usize,
    /// Threads that libtorch uses for one operation.
    pub threads: i64,
    /// Type of weights and activations: `bfloat16` or `float32`.
    pub dtype: String,
}

/// A GPU as its driver lists it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Gpu {
    pub name: String,
    /// With its unit: `81559 MiB`.
    pub memory: String,
}

/// Versions of the software.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Toolkit {
    pub version: String,
    pub libtorch: Option<String>,
}

impl Toolkit {
    /// The versions of this process.
    pub fn current() -> Self {
        Toolkit { version: crate::VERSION.to_owned(), libtorch: libtorch_version() }
    }
}

impl Hardware {
    /// This machine with `device` in use.
    pub fn detect(device: Device) -> Self {
        let (name, gpu) = match device {
            Device::Cuda(index) => (format!("cuda:{index}"), list_gpus().into_iter().nth(index).map(|gpu| gpu.name)),
            _ => ("cpu".to_owned(), None),
        };
        let dtype = if device.is_cuda() { "bfloat16" } else { "float32" };
        let threads = i64::from(tch::get_num_threads());
        Hardware { device: name, gpu, cpu: cpu_name(), cores: num_cores(), threads, dtype: dtype.to_owned() }
    }

    /// What is known about the GPU; `None` for the CPU and for other GPUs.
    pub fn gpu_model(&self) -> Option<&'static GpuModel> {
        self.gpu.as_deref().and_then(GpuModel::of_driver)
    }

    /// Describes the machine in one line, for tables and reports.
    pub fn summary(&self) -> String {
        let gpu = self.gpu.as_ref().map(|name| format!("{name}; ")).unwrap_or_default();
        let (cores, threads) = (count(self.cores, "core"), count(self.threads, "thread"));
        let device = if self.device == "cpu" { "CPU" } else { &self.device };
        format!("{device}: {gpu}{}, {cores}, {threads}, {}", self.cpu, self.dtype)
    }
}

/// Number of processors that this process may use.
pub fn num_cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Model name of the processor, or its architecture where Linux does not know the name.
pub fn cpu_name() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    text.lines()
        .find(|line| line.starts_with("model name"))
        .and_then(|line| line.split_once(':'))
        .map_or_else(|| std::env::consts::ARCH.to_owned(), |(_, name)| name.trim().to_owned())
}

/// The GPUs that the NVIDIA driver lists; none where there is no driver.
pub fn list_gpus() -> Vec<Gpu> {
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

/// Version of the loaded libtorch: from version.py of a Python wheel, or from build-version of a
/// C++ archive.
pub fn libtorch_version() -> Option<String> {
    let root = libtorch_folder()?.parent()?.to_owned();
    if let Ok(text) = std::fs::read_to_string(root.join("version.py")) {
        let line = text.lines().find(|line| line.starts_with("__version__"))?;
        return Some(line.split('\'').nth(1)?.to_owned());
    }
    std::fs::read_to_string(root.join("build-version")).ok().map(|text| text.trim().to_owned())
}
