//! Named tensors as views of one buffer, so that one update, one norm and one collective serve all of them.

use tch::{Device, Kind, Tensor};

/// The number of elements is a multiple of this, so that 1 to 10, and 12, 14, 15, 16, 32, 64, 128, 256 and many more processes can have
/// equal parts of it that begin where 16 bytes do.
const SHARED_AMONG: u64 = 8 * 5040 * 16;

/// A buffer and what lies in it: matrices first, then vectors (which no weight decay touches), both in the order given.
#[derive(Debug)]
pub struct ParamBuffer {
    buffer: Tensor,
    parts: Vec<Part>,
    matrices: i64,
}

#[derive(Debug, Clone)]
struct Part {
    name: String,
    shape: Vec<i64>,
    start: i64,
}

impl ParamBuffer {
    /// A buffer of zeros for tensors of these names and shapes.
    pub fn zeros(shapes: Vec<(String, Vec<i64>)>, device: Device, kind: Kind) -> Self {
        let mut parts: Vec<Part> = shapes.into_iter().map(|(name, shape)| Part { name, shape, start: 0 }).collect();
        let (mut end, mut matrices) = (0, 0);
        for of_matrices in [true, false] {
            for part in parts.iter_mut().filter(|part| (part.shape.len() > 1) == of_matrices) {
                part.start = end;
                end += part.len();
            }
            if of_matrices {
                matrices = end;
            }
        }
        let padded = (end as u64).next_multiple_of(SHARED_AMONG) as i64;
        ParamBuffer { buffer: Tensor::zeros([padded], (kind, device)), parts, matrices }
    }

    /// Zeros for the same tensors.
    pub fn zeros_like(&self, kind: Kind) -> Self {
        self.with_buffer(Tensor::zeros(self.buffer.size(), (kind, self.buffer.device())))
    }

    /// The same layout in another buffer of as many elements.
    pub fn with_buffer(&self, buffer: Tensor) -> Self {
        assert_eq!(buffer.size(), self.buffer.size());
        ParamBuffer { buffer, parts: self.parts.clone(), matrices: self.matrices }
    }

    /// Copies of the same tensors.
    pub fn copy(&self) -> Self {
        self.with_buffer(self.buffer.copy())
    }

    /// The same tensors in the same buffer.
    pub fn shallow_clone(&self) -> Self {
        self.with_buffer(self.buffer.shallow_clone())
    }

    /// Type of the elements.
    pub fn kind(&self) -> Kind {
        self.buffer.kind()
    }

    /// All of it, `[elements]`, with some zeros at the end.
    pub fn buffer(&self) -> &Tensor {
        &self.buffer
    }

    /// How many leading elements belong to matrices.
    pub fn num_matrix_elements(&self) -> i64 {
        self.matrices
    }

    /// Every tensor under its name, in the order given; they share the buffer.
    pub fn tensors(&self) -> Vec<(String, Tensor)> {
        self.parts.iter().map(|part| (part.name.clone(), self.view(part.start, &part.shape))).collect()
    }

    /// The tensor of a name.
    pub fn get(&self, name: &str) -> Option<Tensor> {
        self.joined(&[name.to_owned()])
    }

    /// Tensors that lie one behind another as one, along their first dimension; `None` where one is missing.
    pub(crate) fn joined(&self, names: &[String]) -> Option<Tensor> {
        let find = |name: &String| self.parts.iter().find(|part| part.name == *name);
        let parts: Vec<&Part> = names.iter().map(find).collect::<Option<_>>()?;
        let adjacent = parts.windows(2).all(|pair| pair[0].start + pair[0].len() == pair[1].start);
        assert!(adjacent, "{names:?} do not lie one behind another");
        let mut shape = parts[0].shape.clone();
        shape[0] = parts.iter().map(|part| part.shape[0]).sum();
        Some(self.view(parts[0].start, &shape))
    }

    fn view(&self, start: i64, shape: &[i64]) -> Tensor {
        let _no_grad = tch::no_grad_guard();
        self.buffer.narrow(0, start, shape.iter().product()).view(shape)
    }
}

impl Part {
    fn len(&self) -> i64 {
        self.shape.iter().product()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn matrices_come_first_and_neighbours_join() {
        let shapes = [("a", vec![2, 3]), ("norm", vec![3]), ("b", vec![1, 3]), ("bias", vec![2])];
        let shapes = shapes.map(|(name, shape)| (name.to_owned(), shape));
        let flat = ParamBuffer::zeros(shapes.into(), Device::Cpu, Kind::Float);
        assert_eq!((flat.num_matrix_elements(), flat.buffer().numel()), (9, SHARED_AMONG as usize));
        let both = flat.joined(&["a".to_owned(), "b".to_owned()]).unwrap();
        assert_eq!(both.size(), [3, 3]);
        let _ = both.get(2).fill_(5.0);
        assert_eq!(Vec::<f32>::try_from(flat.get("b").unwrap().view(-1)).unwrap(), [5.0; 3]);
        assert_eq!(
            flat.tensors().iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(),
            ["a", "norm", "b", "bias"]
        );
        assert!(flat.get("c").is_none());
    }
}
