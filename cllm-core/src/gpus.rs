//! GPUs that people train on: what a run can be planned for on a machine that has none of them, and
//! the peaks that measured speeds are compared with.

use crate::settings::did_you_mean;
use crate::{Error, Result};

/// What is known about a GPU.
#[derive(Debug, PartialEq)]
pub struct GpuModel {
    /// In settings.
    pub name: &'static str,
    /// Words of the name that its driver reports. The first model whose words are all in a name is
    /// meant by it.
    driver_words: &'static [&'static str],
    /// Major and minor compute capability.
    pub capability: (u32, u32),
    /// What CUDA reports as its total memory, which is less than the vendor prints on the box.
    pub memory_bytes: u64,
    /// Dense products of bfloat16 matrices with sums in float32, in operations per second, according
    /// to the vendor.
    pub bf16_flops: f64,
    /// Of its memory, in bytes per second, according to the vendor.
    pub bandwidth: f64,
}

const GIB: f64 = (1u64 << 30) as f64;

const fn gpu(
    name: &'static str,
    driver_words: &'static [&'static str],
    capability: (u32, u32),
    gibibytes: f64,
    teraflops: f64,
    gigabytes_per_second: f64,
) -> GpuModel {
    GpuModel {
        name,
        driver_words,
        capability,
        memory_bytes: (gibibytes * GIB) as u64,
        bf16_flops: teraflops * 1e12,
        bandwidth: gigabytes_per_second * 1e9,
    }
}

/// Sorted by name.
const GPUS: &[GpuModel] = &[
    gpu("a100-40gb", &["A100", "40GB"], (8, 0), 39.4, 312.0, 1555.0),
    gpu("a100-80gb", &["A100"], (8, 0), 79.1, 312.0, 2039.0),
    gpu("a40", &["A40"], (8, 6), 44.4, 149.7, 696.0),
    gpu("a6000", &["RTX", "A6000"], (8, 6), 47.4, 154.8, 768.0),
    gpu("b200", &["B200"], (10, 0), 178.3, 2250.0, 8000.0),
    gpu("gh200", &["GH200"], (9, 0), 94.5, 989.0, 4000.0),
    gpu("h100-80gb", &["H100", "HBM3"], (9, 0), 79.1, 989.0, 3350.0),
    gpu("h100-nvl", &["H100", "NVL"], (9, 0), 93.0, 835.0, 3900.0),
    gpu("h100-pcie", &["H100", "PCIe"], (9, 0), 79.1, 756.0, 2000.0),
    gpu("h200", &["H200"], (9, 0), 139.8, 989.0, 4800.0),
    gpu("l4", &["L4"], (8, 9), 21.9, 121.0, 300.0),
    gpu("l40s", &["L40S"], (8, 9), 44.3, 362.0, 864.0),
    gpu("rtx-3090", &["RTX", "3090"], (8, 6), 23.5, 71.0, 936.0),
    gpu("rtx-4090", &["RTX", "4090"], (8, 9), 23.5, 165.2, 1008.0),
    gpu("rtx-5090", &["RTX", "5090"], (12, 0), 31.3, 209.5, 1792.0),
    gpu("rtx-6000-ada", &["RTX", "6000", "Ada"], (8, 9), 47.4, 364.0, 960.0),
];

impl GpuModel {
    /// The GPU of this name in settings, in upper or lower case, with or without hyphens; `None` for
    /// any other text.
    pub fn find(name: &str) -> Option<&'static GpuModel> {
        let plain = |name: &str| name.replace(['-', '_', ' '], "").to_lowercase();
        GPUS.iter().find(|gpu| plain(gpu.name) == plain(name))
    }

    /// The GPU of this name in settings.
    ///
    /// # Errors
    /// [`Error::Usage`] with all names, and the nearest.
    pub fn named(name: &str) -> Result<&'static GpuModel> {
        Self::find(name).ok_or_else(|| {
            let names: Vec<String> = GPUS.iter().map(|gpu| gpu.name.to_owned()).collect();
            let nearest = did_you_mean(name, &names);
            let known = names.join(", ");
            Error::usage(format!(
                "device `{name}` is unknown: use auto, cpu, cuda or cuda:N, plan for one of {known}, or for any GPU with \
                 memory=80GB (its size){nearest}"
            ))
        })
    }

    /// The GPU whose driver reports this name, such as `NVIDIA H100 80GB HBM3`.
    pub fn of_driver(name: &str) -> Option<&'static GpuModel> {
        let words: Vec<&str> = name.split(|character: char| !character.is_alphanumeric()).collect();
        let has = |word: &&str| words.iter().any(|other| other.eq_ignore_ascii_case(word));
        GPUS.iter().find(|gpu| gpu.driver_words.iter().all(has))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_settings_and_of_drivers_lead_to_the_same_gpus() {
        for (driver, name) in [
            ("NVIDIA A100-SXM4-40GB", "A100-40GB"),
            ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
            ("NVIDIA A100 80GB PCIe", "a100_80gb"),
            ("NVIDIA H100 80GB HBM3", "h100-80gb"),
            ("NVIDIA H100 PCIe", "h100-pcie"),
            ("NVIDIA H200", "h200"),
            ("NVIDIA GH200 480GB", "gh200"),
            ("NVIDIA L40S", "l40s"),
            ("NVIDIA L4", "l4"),
            ("NVIDIA RTX A6000", "a6000"),
            ("NVIDIA RTX 6000 Ada Generation", "rtx-6000-ada"),
            ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ] {
            let gpu = GpuModel::of_driver(driver).unwrap_or_else(|| panic!("{driver}"));
            assert_eq!(Some(gpu), GpuModel::find(name), "{driver}");
        }
        assert_eq!(GpuModel::of_driver("Tesla T4"), None);
        assert!(GPUS.is_sorted_by_key(|gpu| gpu.name));
    }

    #[test]
    fn an_unknown_name_lists_the_known_ones_and_the_nearest() {
        let message = GpuModel::named("h100-80g").unwrap_err().to_string();
        for part in
            ["`h100-80g` is unknown", "did you mean `h100-80gb`", "cuda:N", "a100-40gb", "rtx-4090", "memory=80GB"]
        {
            assert!(message.contains(part), "{message}");
        }
    }
}
