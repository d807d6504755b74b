//! GGUF files: metadata and the places of tensors. Every count and length is checked against the bytes that are left before it is used.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::error::ModelError;
use super::tensor::{Encoding, Tensor};

const MAGIC: [u8; 4] = *b"GGUF";
const DEFAULT_ALIGNMENT: u64 = 32;
const NOT_UTF_8: Value = Value::Other("text that is not UTF-8");

/// A metadata value; numbers are widened.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// Any integer type.
    Integer(i128),
    /// Any float type.
    Float(f64),
    /// A boolean.
    Bool(bool),
    /// Text.
    String(String),
    /// A list of strings.
    Strings(Vec<String>),
    /// A list of integers.
    Integers(Vec<i64>),
    /// A list of floats.
    Floats(Vec<f32>),
    /// What no key that we know has, e.g. a list of lists: skipped, and refused only where it is asked for.
    Other(&'static str),
}

/// Where a tensor lies.
#[derive(Clone, Debug)]
struct Place {
    rows: usize,
    cols: usize,
    kind: u32,
    offset: u64,
}

/// An opened GGUF file.
#[derive(Debug)]
pub struct Gguf {
    /// Metadata by key.
    pub metadata: BTreeMap<String, Value>,
    path: PathBuf,
    file: File,
    length: u64,
    data_start: u64,
    tensors: BTreeMap<String, Place>,
}

impl Gguf {
    /// Reads metadata and tensor directory of the file at `path`.
    ///
    /// # Errors
    /// When the file cannot be read, is no GGUF of version 2 or 3, or a count, length or offset in it cannot be true.
    pub fn open(path: &Path) -> Result<Self, ModelError> {
        let file = File::open(path).map_err(ModelError::read(path))?;
        let length = file.metadata().map_err(ModelError::read(path))?.len();
        let handle = file.try_clone().map_err(ModelError::read(path))?;
        let mut reader = Reader { path, input: BufReader::new(handle), length, position: 0, at: "header".into() };
        let (tensor_count, key_count) = reader.header()?;
        let metadata = reader.metadata(key_count)?;
        let tensors = reader.tensors(tensor_count)?;
        let alignment = match metadata.get("general.alignment") {
            None => DEFAULT_ALIGNMENT,
            Some(Value::Integer(value @ 1..=65536)) => *value as u64,
            Some(other) => return Err(ModelError::invalid(path, "general.alignment", format!("{other:?} is no alignment"))),
        };
        check_offsets(path, &tensors, alignment)?;
        let data_start = reader.position.next_multiple_of(alignment);
        Ok(Self { metadata, path: path.to_owned(), file, length, data_start, tensors })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Names of all tensors.
    pub fn tensor_names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Reads the tensor `name`.
    ///
    /// # Errors
    /// When it is missing, of an unsupported type, or not wholly inside the file.
    pub fn tensor(&self, name: &str) -> Result<Tensor, ModelError> {
        let place = self.tensors.get(name).ok_or_else(|| ModelError::invalid(&self.path, name, "tensor is missing"))?;
        let encoding = encoding(place.kind).ok_or_else(|| ModelError::unsupported(&self.path, name, kind_name(place.kind)))?;
        let end = |size: usize| self.data_start.checked_add(place.offset)?.checked_add(size as u64);
        let size = encoding
            .bytes(place.rows, place.cols)
            .filter(|size| end(*size).is_some_and(|end| end <= self.length))
            .ok_or_else(|| ModelError::invalid(&self.path, name, "tensor reaches beyond the end of the file"))?;
        let mut bytes = vec![0; size];
        self.file.read_exact_at(&mut bytes, self.data_start + place.offset).map_err(ModelError::read(&self.path))?;
        Ok(Tensor::new(place.rows, place.cols, encoding, bytes))
    }

    /// The integer at `key`, if there is one.
    ///
    /// # Errors
    /// When the value is not an integer of 32 bits.
    pub fn integer(&self, key: &str) -> Result<Option<u32>, ModelError> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(Value::Integer(value)) if u32::try_from(*value).is_ok() => Ok(Some(*value as u32)),
            Some(other) => Err(self.mistyped(key, "an integer", other)),
        }
    }

    /// The float at `key`, if there is one.
    ///
    /// # Errors
    /// When the value is not a float.
    pub fn float(&self, key: &str) -> Result<Option<f64>, ModelError> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(Value::Float(value)) => Ok(Some(*value)),
            Some(other) => Err(self.mistyped(key, "a float", other)),
        }
    }

    /// The text at `key`, if there is one.
    ///
    /// # Errors
    /// When the value is not text.
    pub fn text(&self, key: &str) -> Result<Option<&str>, ModelError> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(Value::String(value)) => Ok(Some(value)),
            Some(other) => Err(self.mistyped(key, "text", other)),
        }
    }

    fn mistyped(&self, key: &str, wanted: &str, found: &Value) -> ModelError {
        let found = match found {
            Value::Other(found) => (*found).to_owned(),
            found => format!("{found:?}").chars().take(80).collect(),
        };
        ModelError::invalid(&self.path, key, format!("expected {wanted}, found {found}"))
    }
}

/// Every tensor begins at a multiple of `alignment`, and ends before the next one begins as far as its size is known.
fn check_offsets(path: &Path, tensors: &BTreeMap<String, Place>, alignment: u64) -> Result<(), ModelError> {
    let mut places: Vec<(&String, &Place)> = tensors.iter().collect();
    places.sort_by_key(|(_, place)| place.offset);
    let mut end = 0;
    for (name, place) in places {
        if !place.offset.is_multiple_of(alignment) {
            return Err(ModelError::invalid(path, name, format!("offset {} is no multiple of {alignment}", place.offset)));
        }
        if place.offset < end {
            return Err(ModelError::invalid(
                path,
                name,
                format!("offset {} lies inside the tensor before, which ends at {end}", place.offset),
            ));
        }
        let size = encoding(place.kind).and_then(|encoding| encoding.bytes(place.rows, place.cols)).unwrap_or(0);
        end = place.offset.saturating_add(size as u64);
    }
    Ok(())
}

fn encoding(kind: u32) -> Option<Encoding> {
    match kind {
        0 => Some(Encoding::F32),
        1 => Some(Encoding::F16),
        3 => Some(Encoding::Q4_1),
        8 => Some(Encoding::Q8_0),
        30 => Some(Encoding::Bf16),
        _ => None,
    }
}

fn kind_name(kind: u32) -> String {
    let names = [
        (2, "Q4_0"),
        (6, "Q5_0"),
        (7, "Q5_1"),
        (9, "Q8_1"),
        (10, "Q2_K"),
        (11, "Q3_K"),
        (12, "Q4_K"),
        (13, "Q5_K"),
        (14, "Q6_K"),
        (15, "Q8_K"),
    ];
    let known = names.iter().find(|(number, _)| *number == kind);
    known.map_or_else(|| format!("tensor type {kind}"), |(_, name)| format!("tensor type {name}"))
}

/// A reader that knows how much is left and what it is reading.
struct Reader<'a> {
    path: &'a Path,
    input: BufReader<File>,
    length: u64,
    position: u64,
    at: String,
}

impl Reader<'_> {
    fn invalid(&self, problem: impl Into<String>) -> ModelError {
        ModelError::invalid(self.path, self.at.clone(), problem)
    }

    /// Claims `count` items of at least `size` bytes: an error when the file is too short for them.
    fn claim(&self, count: u64, size: u64, what: &str) -> Result<usize, ModelError> {
        let left = self.length - self.position;
        match count.checked_mul(size) {
            Some(bytes) if bytes <= left => Ok(count as usize),
            _ => Err(self.invalid(format!("{count} {what} do not fit into the {left} bytes that are left"))),
        }
    }

    fn bytes<const N: usize>(&mut self) -> Result<[u8; N], ModelError> {
        self.claim(N as u64, 1, "bytes")?;
        let mut bytes = [0; N];
        self.input.read_exact(&mut bytes).map_err(ModelError::read(self.path))?;
        self.position += N as u64;
        Ok(bytes)
    }

    fn u32(&mut self) -> Result<u32, ModelError> {
        self.bytes().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, ModelError> {
        self.bytes().map(u64::from_le_bytes)
    }

    /// Bytes of text behind their number.
    fn text(&mut self) -> Result<Vec<u8>, ModelError> {
        let length = self.u64()?;
        let mut bytes = vec![0; self.claim(length, 1, "bytes of text")?];
        self.input.read_exact(&mut bytes).map_err(ModelError::read(self.path))?;
        self.position += length;
        Ok(bytes)
    }

    /// The name of a key or tensor.
    fn name(&mut self) -> Result<String, ModelError> {
        String::from_utf8(self.text()?).map_err(|_| self.invalid("name is not UTF-8"))
    }

    fn header(&mut self) -> Result<(u64, u64), ModelError> {
        if self.bytes()? != MAGIC {
            return Err(self.invalid("not a GGUF file"));
        }
        match self.u32()? {
            2 | 3 => Ok((self.u64()?, self.u64()?)),
            version => Err(ModelError::unsupported(self.path, "header", format!("GGUF version {version}"))),
        }
    }

    fn metadata(&mut self, count: u64) -> Result<BTreeMap<String, Value>, ModelError> {
        self.at = "metadata".into();
        // The shortest entry: an empty key, a type, one byte.
        let count = self.claim(count, 13, "metadata entries")?;
        let mut metadata = BTreeMap::new();
        for index in 0..count {
            self.at = format!("metadata key {index}");
            let key = self.name()?;
            self.at.clone_from(&key);
            let kind = self.u32()?;
            let value = if kind == 9 { self.list()? } else { self.scalar(kind)? };
            if metadata.insert(key, value).is_some() {
                return Err(self.invalid("key appears twice"));
            }
        }
        Ok(metadata)
    }

    fn scalar(&mut self, kind: u32) -> Result<Value, ModelError> {
        Ok(match kind {
            6 => Value::Float(f64::from(f32::from_le_bytes(self.bytes()?))),
            12 => Value::Float(f64::from_le_bytes(self.bytes()?)),
            7 => Value::Bool(self.bytes::<1>()?[0] != 0),
            8 => String::from_utf8(self.text()?).map_or(NOT_UTF_8, Value::String),
            10 => Value::Integer(i128::from(self.u64()?)),
            _ => Value::Integer(i128::from(self.integer(kind)?)),
        })
    }

    fn integer(&mut self, kind: u32) -> Result<i64, ModelError> {
        Ok(match kind {
            0 => i64::from(self.bytes::<1>()?[0]),
            1 => i64::from(i8::from_le_bytes(self.bytes()?)),
            2 => i64::from(u16::from_le_bytes(self.bytes()?)),
            3 => i64::from(i16::from_le_bytes(self.bytes()?)),
            4 => i64::from(self.u32()?),
            5 => i64::from(i32::from_le_bytes(self.bytes()?)),
            11 => i64::from_le_bytes(self.bytes()?),
            _ => return Err(self.invalid(format!("unknown value type {kind}"))),
        })
    }

    fn list(&mut self) -> Result<Value, ModelError> {
        let (kind, count) = self.list_head()?;
        Ok(match kind {
            8 => {
                let texts: Vec<Vec<u8>> = (0..count).map(|_| self.text()).collect::<Result<_, _>>()?;
                let texts: Result<_, _> = texts.into_iter().map(String::from_utf8).collect();
                texts.map_or(NOT_UTF_8, Value::Strings)
            }
            6 => Value::Floats((0..count).map(|_| self.bytes().map(f32::from_le_bytes)).collect::<Result<_, _>>()?),
            7 => Value::Integers((0..count).map(|_| self.integer(0)).collect::<Result<_, _>>()?),
            9 => self.skip_lists(count)?,
            10 | 12 => {
                (0..count).try_for_each(|_| self.bytes::<8>().map(drop))?;
                Value::Other("a list of 64-bit numbers")
            }
            _ => Value::Integers((0..count).map(|_| self.integer(kind)).collect::<Result<_, _>>()?),
        })
    }

    /// Type and number of a list's entries.
    fn list_head(&mut self) -> Result<(u32, usize), ModelError> {
        let (kind, count) = (self.u32()?, self.u64()?);
        let least = match kind {
            2 | 3 => 2,
            4..=6 => 4,
            8 | 10..=12 => 8,
            9 => 12,
            _ => 1,
        };
        Ok((kind, self.claim(count, least, "list entries")?))
    }

    /// Reads past `count` lists of whatever depth.
    fn skip_lists(&mut self, mut count: usize) -> Result<Value, ModelError> {
        while count > 0 {
            count -= 1;
            let (kind, entries) = self.list_head()?;
            match kind {
                9 => count = count.saturating_add(entries),
                _ => (0..entries).try_for_each(|_| self.scalar(kind).map(drop))?,
            }
        }
        Ok(Value::Other("a list of lists"))
    }

    fn tensors(&mut self, count: u64) -> Result<BTreeMap<String, Place>, ModelError> {
        self.at = "tensor directory".into();
        // The shortest entry: an empty name, no dimensions, a type, an offset.
        let count = self.claim(count, 24, "tensors")?;
        let mut tensors = BTreeMap::new();
        for index in 0..count {
            self.at = format!("tensor {index}");
            let name = self.name()?;
            self.at.clone_from(&name);
            let dimensions = self.u32()?;
            if dimensions > 4 {
                return Err(self.invalid(format!("{dimensions} dimensions")));
            }
            let mut shape = [1usize; 4];
            for size in shape.iter_mut().take(dimensions as usize) {
                *size = usize::try_from(self.u64()?).map_err(|_| self.invalid("a dimension is too large"))?;
            }
            let rows = shape[1].checked_mul(shape[2]).and_then(|rows| rows.checked_mul(shape[3]));
            let rows = rows.filter(|rows| rows.checked_mul(shape[0]).is_some()).ok_or_else(|| self.invalid("the shape is too large"))?;
            let place = Place { rows, cols: shape[0], kind: self.u32()?, offset: self.u64()? };
            if tensors.insert(name, place).is_some() {
                return Err(self.invalid("tensor appears twice"));
            }
        }
        Ok(tensors)
    }
}
