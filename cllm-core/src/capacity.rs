//! How much memory and disk this machine still has.

use std::path::Path;

use nix::sys::statvfs::statvfs;

use crate::{Error, Result};

/// Memory of the host, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostMemory {
    /// What this process could have if no other had any; swap included.
    pub total: u64,
    /// What this process can still have without swapping.
    pub available: u64,
}

impl HostMemory {
    /// The memory of this machine, or of the control group (of a container or a Slurm job) that this
    /// process is in; `None` if the system does not say.
    pub fn detect() -> Option<Self> {
        let machine = Self::from_meminfo(&std::fs::read_to_string("/proc/meminfo").ok()?)?;
        let groups = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        let group = groups.lines().find_map(|line| line.strip_prefix("0::/"));
        Some(group.map_or(machine, |group| machine.within_groups(Path::new("/sys/fs/cgroup"), Path::new(group))))
    }

    fn from_meminfo(text: &str) -> Option<Self> {
        let bytes = |key: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
            Some(line.split_whitespace().next()?.parse::<u64>().ok()? * 1024)
        };
        let total = bytes("MemTotal")? + bytes("SwapTotal").unwrap_or(0);
        Some(HostMemory { total, available: bytes("MemAvailable")? })
    }

    /// The least that a control group and those that contain it leave (version 2 of control groups).
    fn within_groups(self, root: &Path, group: &Path) -> Self {
        group.ancestors().fold(self, |memory, group| {
            let number = |file: &str| read_number(&root.join(group).join(file));
            let Some(limit) = number("memory.max") else { return memory };
            let statistics = std::fs::read_to_string(root.join(group).join("memory.stat")).unwrap_or_default();
            // Pages of files count as used, but make room when they must.
            let cached = statistics.lines().find_map(|line| line.strip_prefix("inactive_file "));
            let cached = cached.and_then(|number| number.parse().ok()).unwrap_or(0);
            let used = number("memory.current").unwrap_or(0).saturating_sub(cached);
            HostMemory { total: memory.total.min(limit), available: memory.available.min(limit.saturating_sub(used)) }
        })
    }
}

fn read_number(path: &Path) -> Option<u64> {
    std::fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// Bytes that this user can still write to the file system of a path, which need not exist yet.
///
/// # Errors
/// [`Error::Io`] if the file system does not say.
pub fn free_disk_bytes(path: &Path) -> Result<u64> {
    let absolute = std::path::absolute(path).map_err(Error::io(path))?;
    let existing = absolute.ancestors().find(|ancestor| ancestor.exists()).unwrap_or(Path::new("/"));
    let status = statvfs(existing).map_err(|code| Error::io(existing)(code.into()))?;
    Ok(status.blocks_available() * status.fragment_size())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machine_has_some_of_both() {
        let memory = HostMemory::detect().unwrap();
        assert!(0 < memory.available && memory.available <= memory.total, "{memory:?}");
        let dir = tempfile::tempdir().unwrap();
        let (new, old) = (free_disk_bytes(&dir.path().join("a/b")).unwrap(), free_disk_bytes(dir.path()).unwrap());
        assert!(new > 0 && old > 0);
    }

    #[test]
    fn meminfo_is_read_by_its_keys() {
        let text = "MemTotal:       1000 kB\nMemFree: 1 kB\nMemAvailable:    400 kB\nSwapTotal:  24 kB\n";
        let memory = HostMemory::from_meminfo(text).unwrap();
        assert_eq!(memory, HostMemory { total: 1024 * 1024, available: 400 * 1024 });
        assert_eq!(HostMemory::from_meminfo("MemTotal: 7 kB\n"), None);
    }

    #[test]
    fn the_tightest_control_group_counts() {
        let dir = tempfile::tempdir().unwrap();
        let put = |group: &str, file: &str, text: &str| {
            let folder = dir.path().join(group);
            std::fs::create_dir_all(&folder).unwrap();
            std::fs::write(folder.join(file), text).unwrap();
        };
        put("job/step", "memory.max", "max\n");
        put("job", "memory.max", "700\n");
        put("job", "memory.current", "500\n");
        put("job", "memory.stat", "anon 400\ninactive_file 100\n");
        let machine = HostMemory { total: 1000, available: 900 };
        let within = |group: &str| machine.within_groups(dir.path(), Path::new(group));
        assert_eq!(within("job/step"), HostMemory { total: 700, available: 300 });
        assert_eq!(within("other"), machine);
    }
}
