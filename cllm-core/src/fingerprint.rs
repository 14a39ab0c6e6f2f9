//! Short hashes (16 hex digits of BLAKE3) that say whether two files or runs are the same, and
//! random numbers derived from names, which do not depend on the order of the work.

use std::fs::File;
use std::path::Path;

use crate::{Error, Result};

/// Hash of the names, lengths and contents of some files, in the order given.
///
/// # Errors
/// When a file cannot be read.
pub fn hash_files<P: AsRef<Path>>(paths: &[P]) -> Result<String> {
    let mut hasher = blake3::Hasher::new();
    for path in paths {
        let path = path.as_ref();
        let length = std::fs::metadata(path).map_err(Error::io(path))?.len();
        hasher.update(path.file_name().unwrap_or_default().as_encoded_bytes());
        hasher.update(&length.to_le_bytes());
        hasher.update_reader(File::open(path).map_err(Error::io(path))?).map_err(Error::io(path))?;
    }
    Ok(hasher.finalize().to_hex()[..16].to_owned())
}

/// Hash of a file's contents, whatever its name.
///
/// # Errors
/// When the file cannot be read.
pub fn hash_contents(path: &Path) -> Result<String> {
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(File::open(path).map_err(Error::io(path))?).map_err(Error::io(path))?;
    Ok(hasher.finalize().to_hex()[..16].to_owned())
}

pub fn hash_bytes(bytes: &[u8]) -> String {
    blake3::hash(bytes).to_hex()[..16].to_owned()
}

/// A random generator for one (seed, name, index). Its numbers do not depend on what other
/// generators drew, so no generator state is ever saved.
pub fn derive_rng(seed: u64, name: &str, index: u64) -> rand_chacha::ChaCha8Rng {
    rand::SeedableRng::from_seed(*hash(seed, name, index).as_bytes())
}

/// A seed for one (seed, name).
pub fn derive_seed(seed: u64, name: &str) -> u64 {
    let mut first = [0; 8];
    first.copy_from_slice(&hash(seed, name, u64::MAX).as_bytes()[..8]);
    u64::from_le_bytes(first)
}

fn hash(seed: u64, name: &str, index: u64) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&seed.to_le_bytes());
    hasher.update(&index.to_le_bytes());
    hasher.update(name.as_bytes());
    hasher.finalize()
}
