//! Folders in Hugging Face's layout: `config.json` and one or more `*.safetensors`. Headers are checked before anything is allocated by them.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::error::ModelError;
use super::shards;
use super::tensor::{Encoding, Tensor};

/// Longest header the format allows.
const MAX_HEADER: u64 = 100_000_000;

#[derive(Deserialize)]
struct Entry {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: (u64, u64),
}

/// The tensors of a folder.
pub struct Folder {
    path: PathBuf,
    /// The files that hold the weights, sorted by name.
    pub files: Vec<PathBuf>,
    tensors: BTreeMap<String, (usize, u64, Entry)>,
}

impl Folder {
    /// Reads the headers of all files in the folder `path` that hold its weights.
    ///
    /// # Errors
    /// When there is none, one is missing, or a header is damaged or contradicts its file or another.
    pub fn open(path: &Path) -> Result<Self, ModelError> {
        let files = shards::find(path)?;
        let mut tensors = BTreeMap::new();
        for (index, file) in files.iter().enumerate() {
            for (name, start, entry) in read_header(file)? {
                if let Some(name) = tensors.insert(name.clone(), (index, start, entry)).map(|_| name) {
                    return Err(ModelError::invalid(file, name, "tensor appears twice"));
                }
            }
        }
        Ok(Self { path: path.to_owned(), files, tensors })
    }

    /// Reads the tensor `name`.
    ///
    /// # Errors
    /// When it is missing, not of a supported number type, or its size contradicts its shape.
    pub fn tensor(&self, name: &str) -> Result<Tensor, ModelError> {
        let (file, start, entry) = self.tensors.get(name).ok_or_else(|| ModelError::invalid(&self.path, name, "tensor is missing"))?;
        let path = &self.files[*file];
        let encoding = match entry.dtype.as_str() {
            "F32" => Encoding::F32,
            "F16" => Encoding::F16,
            "BF16" => Encoding::Bf16,
            other => return Err(ModelError::unsupported(path, name, format!("number type {other}"))),
        };
        let (rows, cols) = match entry.shape[..] {
            [cols] => (1, cols),
            [rows, cols] => (rows, cols),
            _ => return Err(ModelError::unsupported(path, name, format!("shape {:?}", entry.shape))),
        };
        let (begin, end) = entry.data_offsets;
        let size = encoding.bytes(rows, cols).filter(|size| end.checked_sub(begin) == Some(*size as u64));
        let size =
            size.ok_or_else(|| ModelError::invalid(path, name, format!("shape {:?} does not fit its {begin}..{end} bytes", entry.shape)))?;
        let mut bytes = vec![0; size];
        let file = File::open(path).map_err(ModelError::read(path))?;
        file.read_exact_at(&mut bytes, start + begin).map_err(ModelError::read(path))?;
        Ok(Tensor::new(rows, cols, encoding, bytes))
    }
}

/// Name, start of the data and entry of every tensor of a file.
fn read_header(path: &Path) -> Result<Vec<(String, u64, Entry)>, ModelError> {
    let invalid = |at: &str, problem: String| ModelError::invalid(path, at, problem);
    let file = File::open(path).map_err(ModelError::read(path))?;
    let length = file.metadata().map_err(ModelError::read(path))?.len();
    let Some(most) = length.checked_sub(8) else { return Err(invalid("header", format!("a file of {length} bytes has none"))) };
    let mut size = [0; 8];
    file.read_exact_at(&mut size, 0).map_err(ModelError::read(path))?;
    if size == *b"version " {
        return Err(invalid("header", "it is a Git LFS pointer: fetch the file that it stands for, `git lfs pull`".to_owned()));
    }
    let size = u64::from_le_bytes(size);
    if size > MAX_HEADER || size > most {
        return Err(invalid("header", format!("{size} bytes of header in a file of {length} bytes")));
    }
    let mut header = vec![0; size as usize];
    file.read_exact_at(&mut header, 8).map_err(ModelError::read(path))?;
    let header: BTreeMap<String, serde_json::Value> =
        serde_json::from_slice(&header).map_err(|error| invalid("header", error.to_string()))?;
    let mut tensors = Vec::new();
    for (name, value) in header.into_iter().filter(|(name, _)| name != "__metadata__") {
        let entry: Entry = serde_json::from_value(value).map_err(|error| invalid(&name, error.to_string()))?;
        tensors.push((name, 8 + size, entry));
    }
    tensors.sort_by_key(|(_, _, entry)| entry.data_offsets);
    check_coverage(path, &tensors, most - size)?;
    Ok(tensors)
}

/// The format: every byte of the data belongs to one tensor. `tensors` are in the order of their offsets.
fn check_coverage(path: &Path, tensors: &[(String, u64, Entry)], length: u64) -> Result<(), ModelError> {
    let mut covered = 0;
    for (name, _, entry) in tensors {
        let (begin, end) = entry.data_offsets;
        if begin > end || end > length {
            return Err(ModelError::invalid(path, name, format!("bytes {begin}..{end} are not inside the file")));
        }
        if begin != covered {
            let problem = format!("bytes {begin}..{end} do not follow those of the tensor before, which end at {covered}");
            return Err(ModelError::invalid(path, name, problem));
        }
        covered = end;
    }
    match length - covered {
        0 => Ok(()),
        left => Err(ModelError::invalid(path, "data", format!("{left} bytes at the end belong to no tensor"))),
    }
}
