//! One safetensors file: its header, and its tensors read in pieces of bounded size.

use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use safetensors::Dtype;
use safetensors::tensor::Metadata;
use serde_json::{Map, Value, json};
use tch::{Device, Kind, Tensor};

use crate::cuda::host_buffer::HostBuffer;
use crate::pieces::{FilePiece, PIECE_BYTES, read_pieces};
use crate::{Error, Result};

/// Length of the header's own length, at the start of a file.
const LENGTH_BYTES: usize = 8;
/// Maximum length of a header, as in the `safetensors` crate.
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// A safetensors file that is open for reading.
pub struct TensorFile {
    file: Rc<OpenFile>,
    /// First byte of the tensors.
    data_start: u64,
    header: Metadata,
}

struct OpenFile {
    file: File,
    path: PathBuf,
}

impl TensorFile {
    /// Opens a file and checks that it is complete. `advice` says what to do if it is not.
    ///
    /// # Errors
    /// [`Error::File`] for a file that is not complete, [`Error::Io`] for one that cannot be read.
    pub fn open(path: &Path, advice: &str) -> Result<Self> {
        let mut file = File::open(path).map_err(Error::io(path))?;
        let file_bytes = file.metadata().map_err(Error::io(path))?.len();
        let incomplete = |problem: &dyn std::fmt::Display| {
            Error::file(path, format!("is not a complete safetensors file ({problem}); {advice}"))
        };
        let mut length = [0; LENGTH_BYTES];
        file.read_exact(&mut length).map_err(|_| incomplete(&"it has no header"))?;
        let header_bytes = u64::from_le_bytes(length);
        if header_bytes > MAX_HEADER_BYTES.min(file_bytes.saturating_sub(LENGTH_BYTES as u64)) {
            return Err(incomplete(&"it ends within its header"));
        }
        let mut json = vec![0; header_bytes as usize];
        file.read_exact(&mut json).map_err(Error::io(path))?;
        let header: Metadata = serde_json::from_slice(&json).map_err(|error| incomplete(&error))?;
        let data_start = LENGTH_BYTES as u64 + header_bytes;
        if data_start + header.data_len() as u64 != file_bytes {
            let expected = data_start + header.data_len() as u64;
            return Err(incomplete(&format!("it has {file_bytes} bytes instead of {expected}")));
        }
        Ok(TensorFile { file: Rc::new(OpenFile { file, path: path.to_owned() }), data_start, header })
    }

    /// The tensors with their names, in no particular order.
    pub fn tensors(&self) -> impl Iterator<Item = (String, StoredTensor)> {
        self.header.tensors().into_iter().map(|(name, info)| {
            let tensor = StoredTensor {
                file: Rc::clone(&self.file),
                start: self.data_start + info.data_offsets.0 as u64,
                dtype: info.dtype,
                shape: info.shape.iter().map(|&size| size as i64).collect(),
            };
            (name, tensor)
        })
    }

    /// A text of the file's metadata.
    pub fn metadata(&self, key: &str) -> Option<&str> {
        self.header.metadata().as_ref()?.get(key).map(String::as_str)
    }
}

/// A tensor in a file.
#[derive(Clone)]
pub struct StoredTensor {
    file: Rc<OpenFile>,
    /// Its first byte in the file.
    start: u64,
    dtype: Dtype,
    shape: Vec<i64>,
}

impl StoredTensor {
    /// The file that holds it.
    pub fn path(&self) -> &Path {
        &self.file.path
    }

    pub fn shape(&self) -> &[i64] {
        &self.shape
    }

    pub fn num_elements(&self) -> i64 {
        self.shape.iter().product()
    }

    /// Its type, where this toolkit can read it. `name` is for the message.
    ///
    /// # Errors
    /// [`Error::File`] for other types.
    pub fn kind(&self, name: &str) -> Result<Kind> {
        match self.dtype {
            Dtype::F64 => Ok(Kind::Double),
            Dtype::F32 => Ok(Kind::Float),
            Dtype::F16 => Ok(Kind::Half),
            Dtype::BF16 => Ok(Kind::BFloat16),
            other => {
                let message = format!(
                    "`{name}` is {other:?}, but only F64, F32, F16 and BF16 are supported: use the checkpoint in bfloat16"
                );
                Err(Error::file(self.path(), message))
            }
        }
    }

    /// Some of its elements, as a tensor of one dimension.
    #[must_use]
    pub fn narrow(&self, elements: Range<i64>) -> Self {
        let start = self.start + elements.start as u64 * self.element_bytes() as u64;
        StoredTensor { start, shape: vec![elements.end - elements.start], ..self.clone() }
    }

    fn element_bytes(&self) -> usize {
        self.dtype.bitsize() / 8
    }

    /// Its elements, in pieces of at most `max_elements`.
    fn pieces(&self, max_elements: i64) -> impl Iterator<Item = (Range<i64>, FilePiece<'_>)> {
        let (num_elements, element_bytes) = (self.num_elements(), self.element_bytes());
        (0..num_elements).step_by(max_elements as usize).map(move |first| {
            let elements = first..num_elements.min(first + max_elements);
            let piece = FilePiece {
                file: &self.file.file,
                path: &self.file.path,
                start: self.start + first as u64 * element_bytes as u64,
                num_bytes: (elements.end - first) as usize * element_bytes,
            };
            (elements, piece)
        })
    }
}

/// Reads tensors, one after another and each in pieces. `target` is called for each with its index
/// and returns where to put it, a contiguous tensor of as many elements and of any type on
/// `device`; `done` is called with it as soon as it is there. Beside the targets, memory holds a few
/// pieces.
///
/// # Errors
/// Files that cannot be read; the errors of the two functions.
pub fn read_tensors(
    tensors: &[(String, StoredTensor)],
    device: Device,
    mut target: impl FnMut(usize) -> Result<Tensor>,
    mut done: impl FnMut(usize, Tensor) -> Result<()>,
) -> Result<()> {
    let _no_grad = tch::no_grad_guard();
    let (mut parts, mut pieces, mut kinds) = (Vec::new(), Vec::new(), Vec::new());
    for (index, (name, tensor)) in tensors.iter().enumerate() {
        kinds.push(tensor.kind(name)?);
        for (elements, piece) in tensor.pieces((PIECE_BYTES / tensor.element_bytes()) as i64) {
            parts.push((index, elements));
            pieces.push(piece);
        }
    }
    let mut current = None;
    read_pieces(
        &pieces,
        |num_bytes| HostBuffer::new(num_bytes, device),
        |part, buffer| {
            let (index, elements) = &parts[part];
            let whole = match current.take() {
                Some(whole) => whole,
                None => target(*index)?,
            };
            let slice = whole.f_view([-1])?.f_narrow(0, elements.start, elements.end - elements.start)?;
            buffer.send(&slice, kinds[*index])?;
            if elements.end == tensors[*index].1.num_elements() {
                return done(*index, whole);
            }
            current = Some(whole);
            Ok(())
        },
    )
}

/// Whether two stored tensors have the same numbers, whatever their types.
///
/// # Errors
/// Files that cannot be read.
pub(super) fn have_same_numbers(a: (&str, &StoredTensor), b: (&str, &StoredTensor)) -> Result<bool> {
    if a.1.shape != b.1.shape {
        return Ok(false);
    }
    let kinds =
        [a.0, b.0].iter().zip([a.1, b.1]).map(|(name, tensor)| tensor.kind(name)).collect::<Result<Vec<_>>>()?;
    let max_elements = (PIECE_BYTES / a.1.element_bytes().max(b.1.element_bytes())) as i64;
    let pairs = a.1.pieces(max_elements).zip(b.1.pieces(max_elements));
    let (sizes, pieces): (Vec<_>, Vec<_>) =
        pairs.flat_map(|((elements, a), (_, b))| [a, b].map(|piece| (elements.end - elements.start, piece))).unzip();
    let (mut of_a, mut are_same) = (Tensor::new(), true);
    read_pieces(
        &pieces,
        |num_bytes| HostBuffer::new(num_bytes, Device::Cpu),
        |index, buffer| {
            let numbers = Tensor::f_zeros([sizes[index]], (Kind::Float, Device::Cpu))?;
            buffer.send(&numbers, kinds[index % 2])?;
            match index % 2 {
                0 => of_a = numbers,
                _ => are_same &= of_a.f_equal(&numbers)?,
            }
            Ok(())
        },
    )?;
    Ok(are_same)
}

/// Name, type and shape of a tensor to write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSpec {
    pub name: String,
    pub kind: Kind,
    pub shape: Vec<i64>,
}

impl TensorSpec {
    pub fn num_bytes(&self) -> usize {
        self.shape.iter().product::<i64>() as usize * self.kind.elt_size_in_bytes()
    }
}

/// The beginning of a file of these tensors, up to the first byte of the first, and the number of
/// bytes that follow. `metadata` are texts for readers of the file.
///
/// # Errors
/// [`Error::Internal`] for a type that this toolkit does not write.
pub(super) fn header(metadata: &[(&str, String)], tensors: &[TensorSpec]) -> Result<(Vec<u8>, usize)> {
    let mut texts = Map::from_iter([("format".to_owned(), json!("pt"))]);
    texts.extend(metadata.iter().map(|(key, text)| ((*key).to_owned(), json!(text))));
    let mut fields = Map::from_iter([("__metadata__".to_owned(), Value::Object(texts))]);
    let mut end = 0;
    for tensor in tensors {
        let start = end;
        end += tensor.num_bytes();
        let dtype = dtype_names(tensor.kind)?.safetensors;
        let info = json!({ "dtype": dtype, "shape": tensor.shape, "data_offsets": [start, end] });
        fields.insert(tensor.name.clone(), info);
    }
    let mut json = Value::Object(fields).to_string();
    // The format asks for data aligned to 8 bytes.
    json.push_str(&" ".repeat(json.len().next_multiple_of(8) - json.len()));
    Ok(([&(json.len() as u64).to_le_bytes(), json.as_bytes()].concat(), end))
}

/// The names of a type in safetensors files and in config.json.
pub(super) struct DtypeNames {
    safetensors: &'static str,
    /// As in config.json and in PyTorch.
    pub(super) torch: &'static str,
}

pub(super) fn dtype_names(kind: Kind) -> Result<DtypeNames> {
    match kind {
        Kind::Float => Ok(DtypeNames { safetensors: "F32", torch: "float32" }),
        Kind::Half => Ok(DtypeNames { safetensors: "F16", torch: "float16" }),
        Kind::BFloat16 => Ok(DtypeNames { safetensors: "BF16", torch: "bfloat16" }),
        other => Err(Error::internal(format!("weights cannot be saved as {other:?}"))),
    }
}
