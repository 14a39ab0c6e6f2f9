//! Host memory of this process, as Linux counts it. Pages of files that are mapped count too.

/// The most that this process has had in memory at a time, in bytes; `None` if the system does not
/// say.
pub fn peak_bytes() -> Option<u64> {
    status_bytes("VmHWM:")
}

fn status_bytes(key: &str) -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let kilobytes = status.lines().find_map(|line| line.strip_prefix(key))?.split_whitespace().next()?.parse::<u64>();
    Some(kilobytes.ok()? * 1024)
}

/// How much a process grows while it does something.
pub struct PeakGrowth {
    bytes_before: u64,
}

impl PeakGrowth {
    /// Starts a new peak, which [`peak_bytes`] then means; `None` if the system does not let it.
    pub fn start() -> Option<Self> {
        std::fs::write("/proc/self/clear_refs", "5").ok()?;
        Some(PeakGrowth { bytes_before: status_bytes("VmRSS:")? })
    }

    /// The peak since then, above what the process had.
    pub fn bytes(&self) -> Option<u64> {
        Some(peak_bytes()?.saturating_sub(self.bytes_before))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn growth_is_that_of_the_largest_moment() {
        // Other tests of this process allocate and free meanwhile, but nothing near this size.
        const BYTES: usize = 400 << 20;
        let growth = PeakGrowth::start().unwrap();
        drop(std::hint::black_box(vec![1u8; BYTES]));
        let grown = growth.bytes().unwrap();
        assert!(grown > BYTES as u64 / 2, "{grown}");
        assert!(peak_bytes().unwrap() > BYTES as u64);
    }
}
