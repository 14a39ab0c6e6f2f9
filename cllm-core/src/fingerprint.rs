//! Short hashes (16 hex digits of BLAKE3) that say whether two files or runs are the same, and
//! random numbers derived from names, which do not depend on the order of the work.

use std::fs::File;
use std::path::Path;

use crate::pieces::{FilePiece, PIECE_BYTES, read_pieces};
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
        update_with_contents(&mut hasher, path)?;
    }
    Ok(hasher.finalize().to_hex()[..16].to_owned())
}

/// Hash of a file's contents, whatever its name.
///
/// # Errors
/// When the file cannot be read.
pub fn hash_contents(path: &Path) -> Result<String> {
    Ok(contents_hash(path)?.to_hex()[..16].to_owned())
}

/// The whole hash of a file's contents.
pub(crate) fn contents_hash(path: &Path) -> Result<blake3::Hash> {
    let mut hasher = blake3::Hasher::new();
    update_with_contents(&mut hasher, path)?;
    Ok(hasher.finalize())
}

/// Several threads read the file, piece by piece, and hash it: a model's fingerprint should take no
/// longer than reading it.
fn update_with_contents(hasher: &mut blake3::Hasher, path: &Path) -> Result<()> {
    let file = File::open(path).map_err(Error::io(path))?;
    let metadata = file.metadata().map_err(Error::io(path))?;
    if !metadata.is_file() {
        // A pipe can only be read from its start to its end.
        hasher.update_reader(file).map_err(Error::io(path))?;
        return Ok(());
    }
    let piece = |start: u64| FilePiece {
        file: &file,
        path,
        start,
        num_bytes: (metadata.len() - start).min(PIECE_BYTES as u64) as usize,
    };
    let pieces: Vec<_> = (0..metadata.len()).step_by(PIECE_BYTES).map(piece).collect();
    read_pieces(
        &pieces,
        |num_bytes| Ok(vec![0; num_bytes]),
        |index, buffer| {
            hasher.update_rayon(&buffer[..pieces[index].num_bytes]);
            Ok(())
        },
    )
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_and_pipes_hash_like_the_whole() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("numbers");
        let content: Vec<u8> = (0..PIECE_BYTES / 2 + 3).flat_map(|index| (index as u32).to_le_bytes()).collect();
        for length in [0, 1, PIECE_BYTES, content.len()] {
            std::fs::write(&path, &content[..length]).unwrap();
            assert_eq!(hash_contents(&path).unwrap(), hash_bytes(&content[..length]));
        }
        let named = [b"numbers", &(content.len() as u64).to_le_bytes()[..], &content].concat();
        assert_eq!(hash_files(&[&path]).unwrap(), hash_bytes(&named));
        assert_eq!(hash_contents(Path::new("/dev/null")).unwrap(), hash_bytes(b""));
    }
}
