//! `doctor`: what works on this machine, and why the rest does not.

use std::path::{Path, PathBuf};

use cllm_core::environment::{self, Gpu};
use cllm_core::sandbox::Sandbox;
use serde::Serialize;

#[derive(Debug, Clone, Serialize)]
pub struct Findings {
    pub schema_version: u32,
    /// Version of the toolkit.
    pub version: &'static str,
    /// Optional features that the program was built with.
    pub features: Vec<&'static str>,
    /// Version of libtorch.
    pub libtorch: Option<String>,
    /// Folder that libtorch was loaded from.
    pub libtorch_folder: Option<PathBuf>,
    /// Whether libtorch can use a GPU.
    pub cuda_available: bool,
    /// Why libtorch cannot use a GPU.
    pub cuda_problem: Option<String>,
    /// GPUs that the driver lists.
    pub gpus: Vec<Gpu>,
    /// Model name of the processor.
    pub cpu: String,
    /// Number of processors that this process may use.
    pub cores: usize,
    /// Layers of the sandbox for the code of answers.
    pub sandbox: Vec<String>,
    /// Why there is no sandbox.
    pub sandbox_problem: Option<String>,
    /// Folder of the Hugging Face cache.
    pub hub_cache: PathBuf,
    /// Ids of the models in the cache.
    pub cached_models: Vec<String>,
}

/// Examines this machine.
pub fn examine() -> Findings {
    let folder = environment::libtorch_folder();
    let available = tch::Cuda::is_available();
    let gpus = environment::list_gpus();
    let hub_cache = cllm_core::checkpoint::hub::cache_folder();
    let sandbox = Sandbox::open();
    Findings {
        schema_version: 1,
        version: cllm_core::VERSION,
        features: if cfg!(feature = "hub") { vec!["hub"] } else { vec![] },
        libtorch: environment::libtorch_version(),
        cuda_problem: (!available).then(|| cuda_problem(folder.as_deref(), !gpus.is_empty())),
        libtorch_folder: folder,
        cuda_available: available,
        gpus,
        cpu: environment::cpu_name(),
        cores: environment::num_cores(),
        sandbox_problem: sandbox.as_ref().err().map(ToString::to_string),
        sandbox: sandbox.map(|sandbox| sandbox.layers().to_vec()).unwrap_or_default(),
        cached_models: cached_models(&hub_cache),
        hub_cache,
    }
}

fn cuda_problem(libtorch: Option<&Path>, driver_works: bool) -> String {
    let loaded = std::fs::read_to_string("/proc/self/maps").is_ok_and(|maps| maps.contains("libtorch_cuda.so"));
    let beside = libtorch.is_some_and(|folder| folder.join("libtorch_cuda.so").exists());
    let device = Path::new("/dev/nvidiactl").exists();
    if !beside {
        "this libtorch was built for CPUs (it has no libtorch_cuda.so): run scripts/setup on the GPU machine".to_owned()
    } else if !loaded {
        "libtorch_cuda.so exists, but this program did not load it, because the linker dropped it: build again with `cargo \
         build` in the repository, whose build.rs keeps it"
            .to_owned()
    } else if !device {
        "libtorch has its CUDA libraries, but this machine has no NVIDIA GPU (/dev/nvidiactl is missing)".to_owned()
    } else if !driver_works {
        "there is an NVIDIA device, but nvidia-smi does not answer: install or repair the driver".to_owned()
    } else {
        "the driver works, but libtorch sees no GPU: CUDA_VISIBLE_DEVICES may hide it, or the driver may be older than \
         CUDA 13.0 (580 or newer is needed)"
            .to_owned()
    }
}

fn cached_models(cache: &Path) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(cache) else { return Vec::new() };
    let mut models: Vec<String> = entries
        .flatten()
        .filter_map(|entry| Some(entry.file_name().to_str()?.strip_prefix("models--")?.replace("--", "/")))
        .collect();
    models.sort();
    models
}

impl Findings {
    /// Formats one line for each finding.
    pub fn text(&self) -> String {
        let or_none = |list: &[String]| if list.is_empty() { "none".to_owned() } else { list.join(", ") };
        let cuda = match &self.cuda_problem {
            None => "yes".to_owned(),
            Some(problem) => format!("no: {problem}"),
        };
        let sandbox = match &self.sandbox_problem {
            None => self.sandbox.join(", "),
            Some(problem) => format!("no: {problem}"),
        };
        let gpus: Vec<_> = self.gpus.iter().map(|gpu| format!("{} ({})", gpu.name, gpu.memory)).collect();
        let features: Vec<_> = self.features.iter().map(|&feature| feature.to_owned()).collect();
        let folder = self.libtorch_folder.as_ref().map(|path| path.display().to_string());
        format!(
            "toolkit    {}\nfeatures   {}\nlibtorch   {} in {}\nCUDA       {cuda}\nGPUs       {}\nCPU        {}, {} \
             cores\nsandbox    {sandbox}\nhub cache  {}: {}\n",
            self.version,
            or_none(&features),
            self.libtorch.as_deref().unwrap_or("of unknown version"),
            folder.as_deref().unwrap_or("an unknown folder"),
            or_none(&gpus),
            self.cpu,
            self.cores,
            self.hub_cache.display(),
            or_none(&self.cached_models),
        )
    }
}
