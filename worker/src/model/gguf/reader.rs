//! The head of a GGUF file. Every count and length is checked against the bytes that are left before it is used.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, ErrorKind, Read};
use std::path::Path;

use super::integers::{Integers, width};
use super::{Place, Value};
use crate::model::error::ModelError;

const MAGIC: [u8; 4] = *b"GGUF";
const NOT_UTF_8: Value = Value::Other("text that is not UTF-8");

/// Metadata, tensors, and the place of the first byte behind both.
pub(super) type Head = (BTreeMap<String, Value>, BTreeMap<String, Place>, u64);

/// Reads the head of `file`, which is `length` bytes long, or will be: where it ends before its head does, the error is [`ErrorKind::UnexpectedEof`].
pub(super) fn read(path: &Path, file: File, length: u64) -> Result<Head, ModelError> {
    let there = file.metadata().map_err(ModelError::read(path))?.len().min(length);
    let mut reader = Reader { path, input: BufReader::new(file), length, there, position: 0, at: "header".into() };
    let (tensors, keys) = reader.header()?;
    Ok((reader.metadata(keys)?, reader.tensors(tensors)?, reader.position))
}

/// A reader that knows how much is left and what it is reading.
struct Reader<'a> {
    path: &'a Path,
    input: BufReader<File>,
    length: u64,
    /// Bytes of it that are there already.
    there: u64,
    position: u64,
    at: String,
}

impl Reader<'_> {
    fn invalid(&self, problem: impl Into<String>) -> ModelError {
        ModelError::invalid(self.path, self.at.clone(), problem)
    }

    /// Claims `count` items of at least `size` bytes: an error when the file is too short for them.
    fn claim(&self, count: u64, size: u64, what: &str) -> Result<usize, ModelError> {
        let (left, there) = (self.length - self.position, self.there - self.position);
        match count.checked_mul(size) {
            Some(bytes) if bytes <= there => Ok(count as usize),
            Some(bytes) if bytes <= left => Err(ModelError::read(self.path)(ErrorKind::UnexpectedEof.into())),
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
        let length = self.claim(length, 1, "bytes of text")?;
        self.take(length)
    }

    /// So many bytes, which are there: see [`Self::claim`].
    fn take(&mut self, length: usize) -> Result<Vec<u8>, ModelError> {
        let mut bytes = vec![0; length];
        self.input.read_exact(&mut bytes).map_err(ModelError::read(self.path))?;
        self.position += length as u64;
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
            6 | 12 => Value::Float(self.float(kind)?),
            7 => Value::Bool(self.bytes::<1>()?[0] != 0),
            8 => String::from_utf8(self.text()?).map_or(NOT_UTF_8, Value::String),
            _ => Value::Integer(self.integers(kind, 1)?.iter().next().unwrap_or_default()),
        })
    }

    fn float(&mut self, kind: u32) -> Result<f64, ModelError> {
        Ok(if kind == 6 { f64::from(f32::from_le_bytes(self.bytes()?)) } else { f64::from_le_bytes(self.bytes()?) })
    }

    /// `count` integers of the type `kind`.
    fn integers(&mut self, kind: u32, count: usize) -> Result<Integers, ModelError> {
        let width = width(kind).ok_or_else(|| self.invalid(format!("unknown value type {kind}")))?;
        let count = self.claim(count as u64, width as u64, "integers")?;
        Ok(Integers::new(kind, width, self.take(count * width)?))
    }

    fn list(&mut self) -> Result<Value, ModelError> {
        let (kind, count) = self.list_head()?;
        Ok(match kind {
            8 => {
                let texts: Vec<Vec<u8>> = (0..count).map(|_| self.text()).collect::<Result<_, _>>()?;
                let texts: Result<_, _> = texts.into_iter().map(String::from_utf8).collect();
                texts.map_or(NOT_UTF_8, Value::Strings)
            }
            6 | 12 => Value::Floats((0..count).map(|_| self.float(kind)).collect::<Result<_, _>>()?),
            9 => self.skip_lists(count)?,
            _ => Value::Integers(self.integers(kind, count)?),
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
            let place = Place { part: 0, rows, cols: shape[0], kind: self.u32()?, offset: self.u64()? };
            if tensors.insert(name, place).is_some() {
                return Err(self.invalid("tensor appears twice"));
            }
        }
        Ok(tensors)
    }
}
