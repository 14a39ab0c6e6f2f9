//! Numbers of bytes: of folders, and as people write them.

use std::path::Path;

use cllm_core::{Error, Result};

/// Units by their lower-case names, the longest first.
const UNITS: [(&str, f64); 13] = [
    ("kib", 1024.0),
    ("mib", 1048576.0),
    ("gib", 1073741824.0),
    ("tib", 1099511627776.0),
    ("kb", 1e3),
    ("mb", 1e6),
    ("gb", 1e9),
    ("tb", 1e12),
    ("k", 1e3),
    ("m", 1e6),
    ("g", 1e9),
    ("t", 1e12),
    ("b", 1.0),
];

/// The bytes of a text such as `80GB`, `79.1 GiB` or `512m`; `None` for any other text. As in SI,
/// 1 GB is 10^9 bytes; 1 GiB is 2^30.
pub fn parse_bytes(text: &str) -> Option<u64> {
    let text = text.trim().to_lowercase();
    let (number, factor) = UNITS.iter().find_map(|&(unit, factor)| Some((text.strip_suffix(unit)?, factor)))?;
    let bytes = number.trim().parse::<f64>().ok()? * factor;
    (bytes >= 1.0 && bytes < 2f64.powi(63)).then_some(bytes as u64)
}

/// In the unit that a person would choose: `58.5 GB`, `812 MB`, `1.2 MB`.
pub fn format_bytes(bytes: u64) -> String {
    match bytes as f64 / 1e6 {
        megabytes if megabytes >= 1e6 => format!("{:.1} TB", megabytes / 1e6),
        megabytes if megabytes >= 1e4 => format!("{:.1} GB", megabytes / 1e3),
        megabytes if megabytes >= 1e3 => format!("{:.2} GB", megabytes / 1e3),
        megabytes if megabytes >= 100.0 => format!("{megabytes:.0} MB"),
        megabytes => format!("{megabytes:.1} MB"),
    }
}

/// Bytes of a file, or of all files in a folder and in those below it; 0 if there is none.
///
/// # Errors
/// Folders that cannot be read.
pub fn folder_bytes(folder: &Path) -> Result<u64> {
    if !folder.is_dir() {
        return Ok(folder.metadata().map_or(0, |metadata| metadata.len()));
    }
    let entries = std::fs::read_dir(folder).map_err(Error::io(folder))?;
    entries.map(|entry| folder_bytes(&entry.map_err(Error::io(folder))?.path())).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_with_their_unit_and_only_with_one() {
        for (text, bytes) in [
            ("80GB", 80_000_000_000),
            ("80 gb", 80_000_000_000),
            ("24G", 24_000_000_000),
            ("79.5GiB", 85_362_475_008),
            ("512MiB", 536_870_912),
            ("1e3 kB", 1_000_000),
            ("7B", 7),
        ] {
            assert_eq!(parse_bytes(text), Some(bytes), "{text}");
        }
        for text in ["80", "GB", "-1GB", "0GB", "80 GB of HBM", "nanGB", "infGB", "1e30TB", ""] {
            assert_eq!(parse_bytes(text), None, "{text}");
        }
    }

    #[test]
    fn sizes_are_written_in_the_unit_that_a_person_would_choose() {
        let texts = [1_234_567, 812_300_000, 2_345_000_000, 58_547_273_728, 24_000_000_000_000].map(format_bytes);
        assert_eq!(texts, ["1.2 MB", "812 MB", "2.35 GB", "58.5 GB", "24.0 TB"]);
    }
}
