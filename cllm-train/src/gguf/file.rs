//! The container: header, key-value metadata, and the location of each tensor.

use std::collections::BTreeMap;

use super::blocks::Format;

/// Type code of a list.
const LIST: u32 = 9;

/// The error is the rest of a sentence that begins with the path of the file.
pub(super) type Parsed<T> = Result<T, String>;

/// A metadata value. All integer types are read into one.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Value {
    Integer(i64),
    Float(f64),
    Bool(bool),
    Text(String),
    List(Vec<Value>),
}

/// One tensor. Its rows consist of whole blocks.
#[derive(Debug, Clone)]
pub(super) struct TensorInfo<'a> {
    /// In the order of safetensors: the dimension that varies fastest is the last.
    pub shape: Vec<i64>,
    pub format: Format,
    pub data: &'a [u8],
}

/// A parsed file. The data of the tensors are borrowed.
pub(super) struct GgufFile<'a> {
    pub values: BTreeMap<String, Value>,
    pub tensors: BTreeMap<String, TensorInfo<'a>>,
}

impl<'a> GgufFile<'a> {
    pub fn parse(bytes: &'a [u8]) -> Parsed<Self> {
        let mut cursor = Cursor { bytes, at: 0 };
        if cursor.bytes.get(..4) != Some(b"GGUF") {
            return Err("is not a GGUF file (it does not start with `GGUF`)".to_owned());
        }
        cursor.at = 4;
        let version = cursor.u32()?;
        if !(2..=3).contains(&version) {
            let hint = if version.swap_bytes() <= 3 { " (a big-endian file)" } else { "" };
            return Err(format!("is GGUF version {version}{hint}; only little-endian 2 and 3 are supported"));
        }
        let (tensor_count, value_count) = (cursor.u64()?, cursor.u64()?);
        let mut values = BTreeMap::new();
        for _ in 0..value_count {
            let key = cursor.text()?;
            let kind = cursor.u32()?;
            let value = cursor.value(kind, &key)?;
            values.insert(key, value);
        }
        let mut headers = Vec::new();
        for _ in 0..tensor_count {
            headers.push(TensorHeader::read(&mut cursor)?);
        }
        let alignment = match values.get("general.alignment") {
            None => 32,
            Some(Value::Integer(size)) if (1..=1 << 20).contains(size) => *size as usize,
            Some(other) => return Err(format!("general.alignment is {other:?}")),
        };
        let start = cursor.at.next_multiple_of(alignment);
        let mut tensors = BTreeMap::new();
        for header in headers {
            let info = header.locate(bytes, start)?;
            tensors.insert(header.name, info);
        }
        Ok(GgufFile { values, tensors })
    }

    pub fn integer(&self, key: &str) -> Parsed<Option<i64>> {
        self.typed(key, "an integer", |value| match value {
            Value::Integer(number) => Some(*number),
            _ => None,
        })
    }

    /// A number. One stored in 32 bits becomes the shortest decimal with that value: 1e-5, not
    /// 9.99999974e-6.
    pub fn float(&self, key: &str) -> Parsed<Option<f64>> {
        self.typed(key, "a number", |value| match value {
            Value::Float(number) if f64::from(*number as f32) == *number => (*number as f32).to_string().parse().ok(),
            Value::Float(number) => Some(*number),
            Value::Integer(number) => Some(*number as f64),
            _ => None,
        })
    }

    pub fn bool(&self, key: &str) -> Parsed<Option<bool>> {
        self.typed(key, "true or false", |value| match value {
            Value::Bool(flag) => Some(*flag),
            _ => None,
        })
    }

    pub fn text(&self, key: &str) -> Parsed<Option<&str>> {
        self.typed(key, "a string", |value| match value {
            Value::Text(text) => Some(text.as_str()),
            _ => None,
        })
    }

    pub fn texts(&self, key: &str) -> Parsed<Option<Vec<&str>>> {
        self.list(key, "strings", |value| match value {
            Value::Text(text) => Some(text.as_str()),
            _ => None,
        })
    }

    pub fn integers(&self, key: &str) -> Parsed<Option<Vec<i64>>> {
        self.list(key, "integers", |value| match value {
            Value::Integer(number) => Some(*number),
            _ => None,
        })
    }

    pub fn floats(&self, key: &str) -> Parsed<Option<Vec<f64>>> {
        self.list(key, "numbers", |value| match value {
            Value::Float(number) => Some(*number),
            _ => None,
        })
    }

    fn list<'s, T>(&'s self, key: &str, kind: &str, get: impl Fn(&'s Value) -> Option<T>) -> Parsed<Option<Vec<T>>> {
        self.typed(key, &format!("a list of {kind}"), |value| match value {
            Value::List(items) => items.iter().map(&get).collect(),
            _ => None,
        })
    }

    fn typed<'s, T>(&'s self, key: &str, kind: &str, get: impl FnOnce(&'s Value) -> Option<T>) -> Parsed<Option<T>> {
        match self.values.get(key) {
            None => Ok(None),
            Some(value) => get(value).map(Some).ok_or_else(|| format!("the value of `{key}` is not {kind}")),
        }
    }
}

/// A tensor's entry in the header.
struct TensorHeader {
    name: String,
    shape: Vec<i64>,
    format: Format,
    /// In bytes, from the start of the tensor data.
    offset: u64,
}

impl TensorHeader {
    fn read(cursor: &mut Cursor<'_>) -> Parsed<Self> {
        let name = cursor.text()?;
        let dimensions = cursor.u32()?;
        if !(1..=4).contains(&dimensions) {
            return Err(format!("tensor `{name}` has {dimensions} dimensions"));
        }
        let mut shape = Vec::new();
        for _ in 0..dimensions {
            let size = cursor.u64()?;
            shape.push(i64::try_from(size).map_err(|_| format!("tensor `{name}` has a dimension of {size}"))?);
        }
        shape.reverse();
        let format = Format::from_code(cursor.u32()?).map_err(|kind| {
            format!("tensor `{name}` is stored as {kind}, which is not supported: use {}", Format::NAMES)
        })?;
        Ok(TensorHeader { name, shape, format, offset: cursor.u64()? })
    }

    /// Finds the data of the tensor in the file. The data of all tensors begins at byte `start`.
    fn locate<'a>(&self, bytes: &'a [u8], start: usize) -> Parsed<TensorInfo<'a>> {
        let TensorHeader { name, shape, format, offset } = self;
        let size = format.row_bytes(shape[shape.len() - 1]).and_then(|row| {
            shape[..shape.len() - 1].iter().try_fold(row, |size, &rows| size.checked_mul(usize::try_from(rows).ok()?))
        });
        let size = size
            .ok_or_else(|| format!("tensor `{name}` of shape {shape:?} does not consist of whole {format:?} blocks"))?;
        let first = usize::try_from(*offset).ok().and_then(|offset| offset.checked_add(start));
        let data = first.and_then(|first| bytes.get(first..first.checked_add(size)?)).ok_or_else(|| {
            format!(
                "is cut off: tensor `{name}` ends at byte {offset} + {size} of the tensor data, which begins at byte {start}, but the \
                 file has only {} bytes; copy or download it again",
                bytes.len()
            )
        })?;
        Ok(TensorInfo { shape: shape.clone(), format: *format, data })
    }
}

/// Reads the header from front to back.
struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn take(&mut self, count: u64) -> Parsed<&'a [u8]> {
        let end = usize::try_from(count).ok().and_then(|count| self.at.checked_add(count));
        let taken = end.and_then(|end| self.bytes.get(self.at..end)).ok_or_else(|| {
            format!("is cut off in its header at byte {} of {}; copy or download it again", self.at, self.bytes.len())
        })?;
        self.at += taken.len();
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Parsed<[u8; N]> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N as u64)?);
        Ok(array)
    }

    fn u32(&mut self) -> Parsed<u32> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Parsed<u64> {
        self.array().map(u64::from_le_bytes)
    }

    fn text(&mut self) -> Parsed<String> {
        let at = self.at;
        let length = self.u64()?;
        let bytes = self.take(length)?;
        String::from_utf8(bytes.to_vec()).map_err(|_| format!("holds a string at byte {at} that is not UTF-8"))
    }

    fn value(&mut self, kind: u32, key: &str) -> Parsed<Value> {
        if kind != LIST {
            return self.scalar(kind, key);
        }
        let (kind, count) = (self.u32()?, self.u64()?);
        let mut items = Vec::new();
        for _ in 0..count {
            items.push(self.scalar(kind, key)?);
        }
        Ok(Value::List(items))
    }

    fn scalar(&mut self, kind: u32, key: &str) -> Parsed<Value> {
        Ok(match kind {
            0 => Value::Integer(self.array().map(u8::from_le_bytes)?.into()),
            1 => Value::Integer(self.array().map(i8::from_le_bytes)?.into()),
            2 => Value::Integer(self.array().map(u16::from_le_bytes)?.into()),
            3 => Value::Integer(self.array().map(i16::from_le_bytes)?.into()),
            4 => Value::Integer(self.u32()?.into()),
            5 => Value::Integer(self.array().map(i32::from_le_bytes)?.into()),
            6 => Value::Float(self.array().map(f32::from_le_bytes)?.into()),
            7 => Value::Bool(self.array::<1>()? != [0]),
            8 => Value::Text(self.text()?),
            10 => {
                let number = self.u64()?;
                Value::Integer(i64::try_from(number).map_err(|_| format!("the value of `{key}` is {number}"))?)
            }
            11 => Value::Integer(self.array().map(i64::from_le_bytes)?),
            12 => Value::Float(self.array().map(f64::from_le_bytes)?),
            LIST => return Err(format!("the value of `{key}` is a list of lists, which is not supported")),
            other => return Err(format!("the value of `{key}` is of the unknown type {other}")),
        })
    }
}
