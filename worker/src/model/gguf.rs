//! GGUF files: metadata and the places of tensors.

mod integers;
mod kinds;
mod reader;
mod split;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::encoding::Encoding;
use super::error::ModelError;
use super::tensor::Tensor;
pub use integers::Integers;
use kinds::encoding;
pub use split::parts;

const DEFAULT_ALIGNMENT: u64 = 32;

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
    /// A list of integers, not widened.
    Integers(Integers),
    /// A list of floats.
    Floats(Vec<f64>),
    /// What no key that we know has, e.g. a list of lists: skipped, and refused only where it is asked for.
    Other(&'static str),
}

/// Where a tensor lies.
#[derive(Clone, Debug)]
struct Place {
    /// Index of its file.
    part: usize,
    rows: usize,
    cols: usize,
    kind: u32,
    offset: u64,
}

/// One of the files.
#[derive(Debug)]
struct Part {
    path: PathBuf,
    file: Arc<File>,
    length: u64,
    data_start: u64,
}

/// An opened GGUF file, or several that are one.
#[derive(Debug)]
pub struct Gguf {
    /// Metadata by key; of several files that of the first.
    pub metadata: BTreeMap<String, Value>,
    parts: Vec<Part>,
    tensors: BTreeMap<String, Place>,
}

impl Gguf {
    /// Reads metadata and tensor directory of the file at `path`, and the directories of those that it is the first of.
    ///
    /// # Errors
    /// When the file cannot be read, is no GGUF of version 2 or 3, or a count, length or offset in it cannot be true. When one of several files is
    /// missing, or is not the one that its name says.
    pub fn open(path: &Path) -> Result<Self, ModelError> {
        let file = File::open(path).map_err(ModelError::read(path))?;
        let length = file.metadata().map_err(ModelError::read(path))?.len();
        let mut first = Self::read(path, file, length)?;
        split::add_others(&mut first)?;
        Ok(first)
    }

    /// The same of a file of which only a beginning is there, and that will be `length` bytes long; of several files the first alone. None when
    /// metadata and directory are not there yet.
    ///
    /// # Errors
    /// As for [`Gguf::open`].
    pub fn open_beginning(path: &Path, length: u64) -> Result<Option<Self>, ModelError> {
        let file = File::open(path).map_err(ModelError::read(path))?;
        match Self::read(path, file, length) {
            Ok(gguf) => Ok(Some(gguf)),
            Err(ModelError::Read { source, .. }) if source.kind() == ErrorKind::UnexpectedEof => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn read(path: &Path, file: File, length: u64) -> Result<Self, ModelError> {
        let handle = file.try_clone().map_err(ModelError::read(path))?;
        let (metadata, tensors, directory_end) = reader::read(path, handle, length)?;
        let alignment = match metadata.get("general.alignment") {
            None => DEFAULT_ALIGNMENT,
            Some(Value::Integer(value @ 1..=65536)) => *value as u64,
            Some(other) => return Err(ModelError::invalid(path, "general.alignment", format!("{other:?} is no alignment"))),
        };
        check_offsets(path, &tensors, alignment)?;
        let data_start = directory_end.next_multiple_of(alignment);
        Ok(Self { metadata, parts: vec![Part { path: path.to_owned(), file: Arc::new(file), length, data_start }], tensors })
    }

    /// The file, or the first of them.
    pub fn path(&self) -> &Path {
        &self.parts[0].path
    }

    /// All files, opened.
    pub fn files(&self) -> impl Iterator<Item = (PathBuf, Arc<File>)> {
        self.parts.iter().map(|part| (part.path.clone(), part.file.clone()))
    }

    /// The file that holds the tensor `name`; the first when none does.
    pub fn file_of(&self, name: &str) -> &Path {
        &self.parts[self.tensors.get(name).map_or(0, |place| place.part)].path
    }

    /// Names of all tensors.
    pub fn tensor_names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Rows of the tensor `name`, if there is one.
    pub fn rows(&self, name: &str) -> Option<usize> {
        self.tensors.get(name).map(|place| place.rows)
    }

    /// Refuses types of tensors that are not read.
    ///
    /// # Errors
    /// When there is one.
    pub fn check_kinds(&self) -> Result<(), ModelError> {
        self.tensors.iter().try_for_each(|(name, place)| self.encoding(name, place).map(drop))
    }

    fn encoding(&self, name: &str, place: &Place) -> Result<Encoding, ModelError> {
        encoding(place.kind).map_err(|kind| ModelError::unsupported(self.file_of(name), name, kind))
    }

    /// Reads the tensor `name`.
    ///
    /// # Errors
    /// When it is missing, of an unsupported type, its rows are not whole blocks, or it is not wholly inside the file.
    pub fn tensor(&self, name: &str) -> Result<Tensor, ModelError> {
        let place = self.tensors.get(name).ok_or_else(|| ModelError::invalid(self.path(), name, "tensor is missing"))?;
        let Part { path, file, length, data_start } = &self.parts[place.part];
        let encoding = self.encoding(name, place)?;
        let invalid = |problem: String| ModelError::invalid(path, name, problem);
        let size = encoding
            .bytes(place.rows, place.cols)
            .ok_or_else(|| invalid(format!("{} rows of {} values are no blocks of {}", place.rows, place.cols, encoding.block().0)))?;
        let begin = data_start.checked_add(place.offset);
        let begin = begin.filter(|begin| begin.checked_add(size as u64).is_some_and(|end| end <= *length));
        let begin = begin.ok_or_else(|| invalid("tensor reaches beyond the end of the file".to_owned()))?;
        Ok(Tensor::new(place.rows, place.cols, encoding, path, file, begin))
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
        ModelError::invalid(self.path(), key, format!("expected {wanted}, found {found}"))
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
        let size = encoding(place.kind).ok().and_then(|encoding| encoding.bytes(place.rows, place.cols)).unwrap_or(0);
        end = place.offset.saturating_add(size as u64);
    }
    Ok(())
}
