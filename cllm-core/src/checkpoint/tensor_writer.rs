//! Writes tensors to safetensors files on a thread of its own. Tensors are copied to host memory in
//! pieces. The thread writes the pieces to disk while the next are copied, and with enough memory
//! for all of them, while the caller does something else.

use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{self, JoinHandle};

use tch::{Device, Kind, Tensor};

use super::tensor_file::{TensorSpec, header};
use crate::atomic_file::UnfinishedFile;
use crate::checksum::WrittenFile;
use crate::cuda::host_buffer::HostBuffer;
use crate::pieces::PIECE_BYTES;
use crate::{Error, Result};

/// Host memory that is enough to copy and write at the same time.
pub const STREAMING_BYTES: usize = 8 * PIECE_BYTES;

/// Writes files, one after another. Each appears whole or not at all.
pub struct TensorWriter {
    device: Device,
    messages: Sender<Message>,
    /// Buffers that the thread has written.
    written: Receiver<HostBuffer>,
    num_buffers: usize,
    max_buffers: usize,
    /// The buffer that is being filled, and its number of bytes so far.
    current: Option<(HostBuffer, usize)>,
    /// Bytes that the current file still lacks.
    remaining_bytes: usize,
    thread: WritingThread,
}

enum Message {
    /// A new file, with its first bytes.
    Begin { path: PathBuf, header: Vec<u8> },
    /// The leading bytes of a buffer.
    Write { buffer: HostBuffer, num_bytes: usize },
    /// The file is complete.
    End,
}

impl TensorWriter {
    /// A writer for tensors of `device` that holds at most `max_bytes` of them in host memory.
    pub fn new(device: Device, max_bytes: usize) -> Self {
        let (messages, received) = channel();
        let (free, written) = channel();
        let thread = WritingThread(Some(thread::spawn(move || write_files(received, free))));
        let max_buffers = (max_bytes / PIECE_BYTES).max(1);
        TensorWriter {
            device,
            messages,
            written,
            num_buffers: 0,
            max_buffers,
            current: None,
            remaining_bytes: 0,
            thread,
        }
    }

    /// Begins a file of these tensors, whose data must follow in this order. `metadata` are texts
    /// for the readers of the file.
    ///
    /// # Errors
    /// An earlier error of the thread, such as a full disk, here and below; [`Error::Internal`] if
    /// the file before is incomplete.
    pub fn begin_file(&mut self, path: &Path, metadata: &[(&str, String)], tensors: &[TensorSpec]) -> Result<()> {
        self.check_complete()?;
        let (header, num_bytes) = header(metadata, tensors)?;
        self.remaining_bytes = num_bytes;
        self.send(Message::Begin { path: path.to_owned(), header })?;
        if num_bytes == 0 { self.send(Message::End) } else { Ok(()) }
    }

    /// Adds a tensor, converted to `kind` piece by piece.
    ///
    /// # Errors
    /// [`Error::Torch`], for example when memory runs out.
    pub fn write(&mut self, tensor: &Tensor, kind: Kind) -> Result<()> {
        let _no_grad = tch::no_grad_guard();
        let elements = tensor.f_detach()?.f_reshape([-1])?;
        let element_bytes = kind.elt_size_in_bytes();
        let mut start = 0;
        while start < elements.size()[0] {
            let count = (self.room(element_bytes)? as i64).min(elements.size()[0] - start);
            let piece = elements.f_narrow(0, start, count)?.f_to_kind(kind)?;
            self.add(count as usize * element_bytes, |buffer, filled| buffer.receive(filled, &piece))?;
            start += count;
        }
        Ok(())
    }

    /// Adds the raw little-endian bytes of a tensor, or a part of them.
    ///
    /// # Errors
    /// As [`Self::write`].
    pub fn write_bytes(&mut self, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() {
            let (piece, rest) = bytes.split_at(self.room(1)?.min(bytes.len()));
            self.add(piece.len(), |buffer, filled| {
                buffer.as_mut()[filled..filled + piece.len()].copy_from_slice(piece);
                Ok(())
            })?;
            bytes = rest;
        }
        Ok(())
    }

    /// How many elements the current buffer still takes, at least one. Buffers are full except at
    /// the end of a file and where the type changes.
    fn room(&mut self, element_bytes: usize) -> Result<usize> {
        match &self.current {
            Some((_, filled)) if filled.is_multiple_of(element_bytes) && *filled < PIECE_BYTES => {}
            _ => {
                self.flush()?;
                self.current = Some((self.free_buffer()?, 0));
            }
        }
        let filled = self.current.as_ref().map_or(0, |(_, filled)| *filled);
        Ok((PIECE_BYTES - filled) / element_bytes)
    }

    /// Adds bytes to the current buffer, which has room for them.
    fn add(&mut self, num_bytes: usize, fill: impl FnOnce(&mut HostBuffer, usize) -> Result<()>) -> Result<()> {
        if num_bytes > self.remaining_bytes {
            return Err(Error::internal("a file gets more tensors than its header names"));
        }
        if let Some((buffer, filled)) = &mut self.current {
            fill(buffer, *filled)?;
            *filled += num_bytes;
        }
        self.remaining_bytes -= num_bytes;
        if self.remaining_bytes > 0 {
            return Ok(());
        }
        self.flush()?;
        self.send(Message::End)
    }

    fn flush(&mut self) -> Result<()> {
        match self.current.take() {
            Some((buffer, num_bytes)) => self.send(Message::Write { buffer, num_bytes }),
            None => Ok(()),
        }
    }

    /// A buffer that the thread has written, or else a new one; waits if there are too many.
    fn free_buffer(&mut self) -> Result<HostBuffer> {
        if let Ok(buffer) = self.written.try_recv() {
            return Ok(buffer);
        }
        if self.num_buffers < self.max_buffers {
            self.num_buffers += 1;
            return HostBuffer::new(PIECE_BYTES, self.device);
        }
        self.written.recv().map_err(|_| self.thread.error())
    }

    fn send(&mut self, message: Message) -> Result<()> {
        self.messages.send(message).map_err(|_| self.thread.error())
    }

    fn check_complete(&self) -> Result<()> {
        match self.remaining_bytes {
            0 => Ok(()),
            missing => Err(Error::internal(format!("a file lacks {missing} bytes of the tensors in its header"))),
        }
    }

    /// Leaves the rest to the thread.
    ///
    /// # Errors
    /// [`Error::Internal`] if the last file is incomplete.
    pub fn finish_in_background(self) -> Result<WritingThread> {
        self.check_complete()?;
        Ok(self.thread)
    }

    /// Waits until all files are on disk, and returns them.
    ///
    /// # Errors
    /// As [`Self::begin_file`].
    pub fn finish(self) -> Result<Vec<WrittenFile>> {
        self.finish_in_background()?.wait()
    }
}

/// A thread that writes what it was given.
pub struct WritingThread(Option<JoinHandle<Result<Vec<WrittenFile>>>>);

impl WritingThread {
    /// Whether it has ended, with all files on disk or with an error.
    pub fn is_finished(&self) -> bool {
        self.0.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Waits until all files are on disk, and returns them.
    ///
    /// # Errors
    /// File-system errors with the path.
    pub fn wait(mut self) -> Result<Vec<WrittenFile>> {
        self.join()
    }

    fn join(&mut self) -> Result<Vec<WrittenFile>> {
        match self.0.take().map(JoinHandle::join) {
            Some(Ok(result)) => result,
            Some(Err(_)) => Err(Error::internal("the thread that writes tensors panicked")),
            None => Ok(Vec::new()),
        }
    }

    /// Why it no longer takes anything.
    fn error(&mut self) -> Error {
        match self.join() {
            Err(error) => error,
            Ok(_) => Error::internal("the thread that writes tensors has ended"),
        }
    }
}

/// An error elsewhere must not leave the thread behind.
impl Drop for WritingThread {
    fn drop(&mut self) {
        // Whoever cares for its result has waited for it.
        let _ = self.join();
    }
}

/// Writes files until the sender of the messages is gone, and returns them. A file that has no end by
/// then leaves nothing behind.
fn write_files(messages: Receiver<Message>, free: Sender<HostBuffer>) -> Result<Vec<WrittenFile>> {
    let mut written = Vec::new();
    let mut current: Option<(PathBuf, UnfinishedFile)> = None;
    for message in messages {
        match message {
            Message::Begin { path, header } => {
                let mut file = UnfinishedFile::create(&path)?;
                file.write(&header)?;
                current = Some((path, file));
            }
            Message::Write { buffer, num_bytes } => {
                if let Some((_, file)) = &mut current {
                    file.write(&buffer.as_slice()[..num_bytes])?;
                }
                // At the end nobody needs the buffer.
                let _ = free.send(buffer);
            }
            Message::End => {
                if let Some((path, file)) = current.take() {
                    written.push((path, file.finish()?));
                }
            }
        }
    }
    Ok(written)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::{TensorFile, read_tensors};

    fn spec(name: &str, kind: Kind, shape: &[i64]) -> TensorSpec {
        TensorSpec { name: name.to_owned(), kind, shape: shape.to_owned() }
    }

    fn read(path: &Path) -> Vec<(String, Tensor)> {
        let file = TensorFile::open(path, "write it again").unwrap();
        let tensors: Vec<_> = file.tensors().collect();
        let mut read = Vec::new();
        let target = |index: usize| {
            let (name, tensor): &(String, _) = &tensors[index];
            Ok(Tensor::zeros(tensor.shape(), (tensor.kind(name)?, Device::Cpu)))
        };
        read_tensors(&tensors, Device::Cpu, target, |index, tensor| {
            read.push((tensors[index].0.clone(), tensor));
            Ok(())
        })
        .unwrap();
        read.sort_by(|a, b| a.0.cmp(&b.0));
        read
    }

    #[test]
    fn tensors_larger_than_all_buffers_are_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let num_elements = 3 * PIECE_BYTES as i64 / 4 + 5;
        let large = Tensor::arange(num_elements, (Kind::Float, Device::Cpu)).view([-1, 1]);
        let small = Tensor::from_slice(&[1.0f32, 2.5, -3.0]);
        let (one, two) = (dir.path().join("one"), dir.path().join("two"));
        let mut writer = TensorWriter::new(Device::Cpu, PIECE_BYTES);
        let specs =
            [spec("a", Kind::BFloat16, &[3]), spec("b", Kind::Float, &[num_elements, 1]), spec("c", Kind::Half, &[3])];
        writer.begin_file(&one, &[("made_by", "a test".to_owned())], &specs).unwrap();
        writer.write(&small, Kind::BFloat16).unwrap();
        writer.write(&large, Kind::Float).unwrap();
        writer.write(&small, Kind::Half).unwrap();
        writer.begin_file(&two, &[], &[spec("empty", Kind::Float, &[0, 3])]).unwrap();
        assert!(writer.num_buffers == 1, "{} buffers", writer.num_buffers);
        writer.finish().unwrap();
        let expected = [("a", small.to_kind(Kind::BFloat16)), ("b", large), ("c", small.to_kind(Kind::Half))];
        assert_eq!(read(&one), expected.map(|(name, tensor)| (name.to_owned(), tensor)));
        let file = TensorFile::open(&one, "").unwrap();
        assert_eq!((file.metadata("made_by"), file.metadata("format")), (Some("a test"), Some("pt")));
        assert_eq!(TensorFile::open(&two, "").unwrap().tensors().next().unwrap().1.shape(), [0, 3]);
    }

    #[test]
    fn a_file_that_was_not_completed_does_not_appear() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("half");
        let begin = || {
            let mut writer = TensorWriter::new(Device::Cpu, PIECE_BYTES);
            writer.begin_file(&path, &[], &[spec("a", Kind::Float, &[4])]).unwrap();
            writer.write_bytes(&[0; 8]).unwrap();
            writer
        };
        let thread = begin().thread;
        thread.wait().unwrap();
        assert!(begin().finish().unwrap_err().to_string().contains("lacks 8 bytes"));
        assert!(begin().write_bytes(&[0; 9]).unwrap_err().to_string().contains("more tensors"));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn an_error_of_the_thread_reaches_the_caller() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("file"), "").unwrap();
        let mut writer = TensorWriter::new(Device::Cpu, PIECE_BYTES);
        let specs = [spec("a", Kind::Float, &[i64::from(u32::MAX)])];
        writer.begin_file(&dir.path().join("file/tensors"), &[], &specs).unwrap();
        let error = (0..10).find_map(|_| writer.write_bytes(&vec![0; PIECE_BYTES]).err()).unwrap().to_string();
        assert!(error.contains("file: cannot be written"), "{error}");
    }
}
