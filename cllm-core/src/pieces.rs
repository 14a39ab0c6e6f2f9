//! Reads files of any size in pieces of bounded size, on several threads.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Mutex, PoisonError};
use std::thread;

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};

use crate::environment::num_cores;
use crate::{Error, Result};

/// Maximum size of a piece, in bytes. Large enough that a copy to a GPU and a read from a fast disk
/// run at full speed, and a power of two, to which libtorch rounds pinned memory.
pub const PIECE_BYTES: usize = 16 << 20;
/// Several reads at a time keep a fast disk busy, and copy faster from the page cache.
const MAX_READERS: usize = 8;

/// A stretch of a file.
#[derive(Debug, Clone, Copy)]
pub struct FilePiece<'f> {
    pub file: &'f File,
    /// For messages.
    pub path: &'f Path,
    /// First byte in the file.
    pub start: u64,
    pub num_bytes: usize,
}

impl FilePiece<'_> {
    fn read(&self, buffer: &mut [u8]) -> Result<()> {
        // Starts to read the whole piece at once. Where the file system does not know the advice,
        // the read is only slower.
        let _ =
            posix_fadvise(self.file, self.start as i64, self.num_bytes as i64, PosixFadviseAdvice::POSIX_FADV_WILLNEED);
        self.file.read_exact_at(&mut buffer[..self.num_bytes], self.start).map_err(Error::io(self.path))
    }
}

/// Reads `pieces` and calls `consume` with the index and the bytes of each, in order. A few buffers
/// from `new_buffer`, which gets their size, serve all of them; only the leading bytes of a buffer
/// are the piece.
///
/// # Errors
/// Files that cannot be read or are too short; the errors of the two functions.
pub fn read_pieces<B: AsMut<[u8]> + Send>(
    pieces: &[FilePiece<'_>],
    new_buffer: impl Fn(usize) -> Result<B>,
    mut consume: impl FnMut(usize, &B) -> Result<()>,
) -> Result<()> {
    let buffer_bytes = pieces.iter().map(|piece| piece.num_bytes).max().unwrap_or(0);
    let total_bytes: usize = pieces.iter().map(|piece| piece.num_bytes).sum();
    if total_bytes <= PIECE_BYTES {
        let mut buffer = new_buffer(buffer_bytes)?;
        return pieces.iter().enumerate().try_for_each(|(index, piece)| {
            piece.read(buffer.as_mut())?;
            consume(index, &buffer)
        });
    }
    let num_readers = num_cores().clamp(2, MAX_READERS);
    let (free, free_buffers) = channel();
    // While the readers wait for the disk, `consume` has two more to work through.
    for _ in 0..(num_readers + 2).min(pieces.len()) {
        let _ = free.send(new_buffer(buffer_bytes)?);
    }
    let (next, free_buffers) = (AtomicUsize::new(0), Mutex::new(free_buffers));
    thread::scope(|scope| {
        let (filled, filled_buffers) = channel();
        for _ in 0..num_readers {
            let filled = filled.clone();
            scope.spawn(|| fill_buffers(pieces, &next, &free_buffers, filled));
        }
        drop(filled);
        // Taking the sender of free buffers along ends the readers when this ends early.
        consume_in_order(pieces.len(), filled_buffers, free, &mut consume)
    })
}

type Filled<B> = Result<(usize, B)>;

/// What a reader does: it takes a free buffer, and only then a piece to read into it. So the first
/// piece that is not yet consumed always has a buffer.
fn fill_buffers<B: AsMut<[u8]>>(
    pieces: &[FilePiece<'_>],
    next: &AtomicUsize,
    free_buffers: &Mutex<Receiver<B>>,
    filled: Sender<Filled<B>>,
) {
    loop {
        let buffer = free_buffers.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(mut buffer) = buffer else { return };
        let index = next.fetch_add(1, Ordering::Relaxed);
        let Some(piece) = pieces.get(index) else { return };
        let read = piece.read(buffer.as_mut());
        if filled.send(read.map(|()| (index, buffer))).is_err() {
            return;
        }
    }
}

fn consume_in_order<B>(
    num_pieces: usize,
    filled_buffers: Receiver<Filled<B>>,
    free: Sender<B>,
    consume: &mut impl FnMut(usize, &B) -> Result<()>,
) -> Result<()> {
    let mut waiting: Vec<(usize, B)> = Vec::new();
    for index in 0..num_pieces {
        let buffer = loop {
            if let Some(found) = waiting.iter().position(|(other, _)| *other == index) {
                break waiting.swap_remove(found).1;
            }
            let filled = filled_buffers.recv().map_err(|_| Error::internal("a thread that reads a file has ended"))?;
            waiting.push(filled?);
        };
        consume(index, &buffer)?;
        // After the last pieces nobody needs the buffer.
        let _ = free.send(buffer);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use super::*;

    fn pieces<'f>(file: &'f File, path: &'f Path, num_bytes: usize, count: usize) -> Vec<FilePiece<'f>> {
        (0..count).map(|index| FilePiece { file, path, start: (index * num_bytes) as u64, num_bytes }).collect()
    }

    #[test]
    fn a_large_file_is_read_in_order_through_a_few_small_buffers() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("numbers");
        const NUM_BYTES: usize = 1 << 16;
        let count = 2 * PIECE_BYTES / NUM_BYTES;
        let content: Vec<u8> = (0..count * NUM_BYTES / 4).flat_map(|index| (index as u32).to_le_bytes()).collect();
        std::fs::write(&path, &content).unwrap();
        let file = File::open(&path).unwrap();
        let num_buffers = AtomicUsize::new(0);
        let new_buffer = |num_bytes| {
            num_buffers.fetch_add(1, Ordering::Relaxed);
            Ok(vec![0u8; num_bytes])
        };
        let mut read = Vec::new();
        read_pieces(&pieces(&file, &path, NUM_BYTES, count), new_buffer, |index, buffer| {
            assert_eq!((read.len(), buffer.len()), (index * NUM_BYTES, NUM_BYTES));
            read.extend_from_slice(buffer);
            Ok(())
        })
        .unwrap();
        assert!(read == content);
        assert!(num_buffers.into_inner() <= MAX_READERS + 2);
        // Past the end of the file, and an error of the consumer: both end all readers.
        let too_long = pieces(&file, &path, NUM_BYTES, count + 1);
        let error = read_pieces(&too_long, |num_bytes| Ok(vec![0u8; num_bytes]), |_, _| Ok(())).unwrap_err();
        assert!(error.to_string().contains("numbers"), "{error}");
        let stop = |index, _: &Vec<u8>| if index == 3 { Err(Error::usage("stop")) } else { Ok(()) };
        let error = read_pieces(&too_long, |num_bytes| Ok(vec![0u8; num_bytes]), stop).unwrap_err();
        assert_eq!(error.to_string(), "stop");
    }
}
