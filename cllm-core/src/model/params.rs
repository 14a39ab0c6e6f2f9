//! Named tensors as views of one buffer, so that one update, one norm and one collective serve all
//! of them.

use std::ops::Range;

use tch::{Device, Kind, Tensor};

use crate::Result;
use crate::fingerprint::hash_bytes;

/// The number of elements is a multiple of this. So 1 to 10 processes, and 12, 14, 15, 16, 32, 64,
/// 128, 256 and many other numbers of them, can own equal shards of the buffer that are aligned to
/// 16 bytes.
const SIZE_MULTIPLE: u64 = 8 * 5040 * 16;

/// Matrices with a row for each token of the vocabulary. They have room for a multiple of this many
/// rows: products with another number of rows take several times as long on a GPU.
const VOCABULARY_MATRICES: [&str; 2] = ["embed_tokens.weight", "lm_head.weight"];
const ROWS_MULTIPLE: u64 = 8;

/// A buffer and the layout of its tensors: matrices first, then vectors (which get no weight
/// decay), each in the order given.
#[derive(Debug)]
pub struct ParamBuffer {
    buffer: Tensor,
    entries: Vec<Entry>,
    num_matrix_elements: i64,
}

#[derive(Debug, Clone)]
struct Entry {
    name: String,
    shape: Vec<i64>,
    /// Index of the first element in the buffer.
    start: i64,
}

impl Entry {
    fn num_elements(&self) -> i64 {
        self.shape.iter().product()
    }

    /// The same with the room that follows it.
    fn num_elements_with_room(&self) -> i64 {
        if VOCABULARY_MATRICES.iter().any(|suffix| self.name.ends_with(suffix)) {
            return self.num_elements() / self.shape[0] * padded_rows(self.shape[0]);
        }
        self.num_elements()
    }
}

fn padded_rows(rows: i64) -> i64 {
    (rows as u64).next_multiple_of(ROWS_MULTIPLE) as i64
}

impl ParamBuffer {
    /// A matrix `[vocab, hidden]` of a buffer with the room that follows it, `[vocab rounded up to a
    /// multiple of 8, hidden]`. What is there does not matter, but is finite.
    ///
    /// # Errors
    /// [`crate::Error::Torch`] for a tensor without that room.
    pub(crate) fn with_room(matrix: &Tensor) -> Result<Tensor> {
        let (rows, width) = matrix.size2()?;
        Ok(matrix.f_as_strided([padded_rows(rows), width], [width, 1], None)?)
    }

    /// The number of elements of a buffer for tensors of so many elements, with the padding at its
    /// end.
    pub fn padded_len(num_elements: i64) -> i64 {
        (num_elements as u64).next_multiple_of(SIZE_MULTIPLE) as i64
    }

    /// A buffer of zeros for tensors of these names and shapes.
    pub fn zeros(shapes: Vec<(String, Vec<i64>)>, device: Device, kind: Kind) -> Self {
        let mut entries: Vec<Entry> = shapes.into_iter().map(|(name, shape)| Entry { name, shape, start: 0 }).collect();
        let mut end = 0;
        let mut lay_out = |is_matrix: bool| {
            for entry in entries.iter_mut().filter(|entry| (entry.shape.len() > 1) == is_matrix) {
                entry.start = end;
                end += entry.num_elements_with_room();
            }
            end
        };
        let num_matrix_elements = lay_out(true);
        let num_elements = lay_out(false);
        ParamBuffer {
            buffer: Tensor::zeros([Self::padded_len(num_elements)], (kind, device)),
            entries,
            num_matrix_elements,
        }
    }

    /// Zeros in the same layout.
    pub fn zeros_like(&self, kind: Kind) -> Self {
        self.with_buffer(Tensor::zeros(self.buffer.size(), (kind, self.buffer.device())))
    }

    /// The same layout over another buffer of the same size.
    pub fn with_buffer(&self, buffer: Tensor) -> Self {
        assert_eq!(buffer.size(), self.buffer.size());
        ParamBuffer { buffer, entries: self.entries.clone(), num_matrix_elements: self.num_matrix_elements }
    }

    /// A copy in memory of its own.
    pub fn copy(&self) -> Self {
        self.with_buffer(self.buffer.copy())
    }

    /// The same tensors in the same memory.
    pub fn shallow_clone(&self) -> Self {
        self.with_buffer(self.buffer.shallow_clone())
    }

    pub fn kind(&self) -> Kind {
        self.buffer.kind()
    }

    /// The whole buffer, `[elements]`, with zeros of padding at the end.
    pub fn buffer(&self) -> &Tensor {
        &self.buffer
    }

    /// Number of leading elements of the buffer that belong to matrices.
    pub fn num_matrix_elements(&self) -> i64 {
        self.num_matrix_elements
    }

    /// Every tensor with its name, in the order given; they are views of the buffer.
    pub fn tensors(&self) -> Vec<(String, Tensor)> {
        self.entries.iter().map(|entry| (entry.name.clone(), self.view(entry.start, &entry.shape))).collect()
    }

    /// The elements of the buffer that belong to each tensor, in the order of [`Self::tensors`].
    pub fn ranges(&self) -> impl Iterator<Item = (&str, Range<i64>)> {
        self.entries.iter().map(|entry| (entry.name.as_str(), entry.start..entry.start + entry.num_elements()))
    }

    /// Fingerprint of the names, shapes and positions of all tensors.
    pub fn layout_fingerprint(&self) -> String {
        let describe = |entry: &Entry| format!("{} {:?} {}\n", entry.name, entry.shape, entry.start);
        hash_bytes(self.entries.iter().map(describe).collect::<String>().as_bytes())
    }

    /// The tensor of this name, a view of the buffer.
    pub fn get(&self, name: &str) -> Option<Tensor> {
        self.get_joined(&[name.to_owned()])
    }

    /// Index of a tensor's first element in the buffer.
    pub(crate) fn start_of(&self, name: &str) -> Option<i64> {
        self.entries.iter().find(|entry| entry.name == name).map(|entry| entry.start)
    }

    /// One view over tensors that are neighbors in the buffer, joined along their first dimension;
    /// `None` if one is missing.
    ///
    /// # Panics
    /// When they are not neighbors.
    pub(crate) fn get_joined(&self, names: &[String]) -> Option<Tensor> {
        let find = |name: &String| self.entries.iter().find(|entry| entry.name == *name);
        let entries: Vec<&Entry> = names.iter().map(find).collect::<Option<_>>()?;
        let adjacent = entries.windows(2).all(|pair| pair[0].start + pair[0].num_elements() == pair[1].start);
        assert!(adjacent, "{names:?} are not neighbors in the buffer");
        let mut shape = entries[0].shape.clone();
        shape[0] = entries.iter().map(|entry| entry.shape[0]).sum();
        Some(self.view(entries[0].start, &shape))
    }

    fn view(&self, start: i64, shape: &[i64]) -> Tensor {
        let _no_grad = tch::no_grad_guard();
        self.buffer.narrow(0, start, shape.iter().product()).view(shape)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn matrices_come_first_and_neighbors_can_be_joined() {
        let shapes = [("a", vec![2, 3]), ("norm", vec![3]), ("b", vec![1, 3]), ("bias", vec![2])];
        let shapes = shapes.map(|(name, shape)| (name.to_owned(), shape));
        let params = ParamBuffer::zeros(shapes.into(), Device::Cpu, Kind::Float);
        assert_eq!((params.num_matrix_elements(), params.buffer().numel()), (9, SIZE_MULTIPLE as usize));
        // The first element after a vocabulary of 5 tokens is the 17th.
        let shapes = [("model.embed_tokens.weight", vec![5, 2]), ("b", vec![1, 3]), ("norm", vec![3])];
        let shapes = shapes.map(|(name, shape)| (name.to_owned(), shape));
        let vocabulary = ParamBuffer::zeros(shapes.into(), Device::Cpu, Kind::Float);
        let starts: Vec<_> = vocabulary.ranges().map(|(_, range)| range).collect();
        assert_eq!((starts, vocabulary.num_matrix_elements()), (vec![0..10, 16..19, 19..22], 19));
        let embedding = vocabulary.get("model.embed_tokens.weight").unwrap();
        assert_eq!((embedding.size(), ParamBuffer::with_room(&embedding).unwrap().size()), (vec![5, 2], vec![8, 2]));
        let joined = params.get_joined(&["a".to_owned(), "b".to_owned()]).unwrap();
        assert_eq!(joined.size(), [3, 3]);
        let _ = joined.get(2).fill_(5.0);
        assert_eq!(Vec::<f32>::try_from(params.get("b").unwrap().view(-1)).unwrap(), [5.0; 3]);
        assert_eq!(
            params.tensors().iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(),
            ["a", "norm", "b", "bias"]
        );
        assert!(params.get("c").is_none());
    }
}
