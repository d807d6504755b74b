//! Folders in Hugging Face's layout: `config.json` and one or more `*.safetensors`. Headers are checked before anything is allocated by them.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use safetensors::Dtype;
use safetensors::tensor::TensorInfo;

use super::encoding::Encoding;
use super::error::ModelError;
use super::read;
use super::shards;
use super::tensor::Tensor;

/// Longest header the format allows.
const MAX_HEADER: u64 = 100_000_000;

/// Bytes of two tensors that are compared at a time.
const PIECE: usize = 1 << 20;

/// The tensors of a folder.
pub struct Folder {
    path: PathBuf,
    /// The files that hold the weights, sorted by name.
    pub files: Vec<(PathBuf, Arc<File>)>,
    tensors: BTreeMap<String, Place>,
}

/// Where a tensor lies, and what it is.
struct Place {
    /// Index of its file.
    file: usize,
    /// First byte of that file's data.
    start: u64,
    info: TensorInfo,
}

impl Place {
    /// Its first byte in the file, and how many there are.
    fn bytes(&self) -> (u64, usize) {
        let (begin, end) = self.info.data_offsets;
        (self.start + begin as u64, end - begin)
    }
}

impl Folder {
    /// Reads the headers of all files in the folder `path` that hold its weights.
    ///
    /// # Errors
    /// When there is none, one is missing, or a header is damaged or contradicts its file or another.
    pub fn open(path: &Path) -> Result<Self, ModelError> {
        let (mut files, mut tensors) = (Vec::new(), BTreeMap::new());
        for (index, path) in shards::find(path)?.into_iter().enumerate() {
            let file = File::open(&path).map_err(ModelError::read(&path))?;
            let (start, infos) = read_header(&path, &file)?;
            for (name, info) in infos {
                if tensors.insert(name.clone(), Place { file: index, start, info }).is_some() {
                    return Err(ModelError::invalid(&path, name, "tensor appears twice"));
                }
            }
            files.push((path, Arc::new(file)));
        }
        Ok(Self { path: path.to_owned(), files, tensors })
    }

    /// Names of all tensors.
    pub fn tensor_names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// The file that holds the tensor `name`; the folder when none does.
    pub fn file_of(&self, name: &str) -> &Path {
        self.tensors.get(name).map_or(&self.path, |place| &self.files[place.file].0)
    }

    /// Reads the tensor `name`.
    ///
    /// # Errors
    /// When it is missing, not of a supported number type, or its size contradicts its shape.
    pub fn tensor(&self, name: &str) -> Result<Tensor, ModelError> {
        let place = self.place(name)?;
        let (path, info) = (&self.files[place.file].0, &place.info);
        let encoding = match info.dtype {
            Dtype::F32 => Encoding::F32,
            Dtype::F16 => Encoding::F16,
            Dtype::BF16 => Encoding::Bf16,
            other => return Err(ModelError::unsupported(path, name, format!("number type {other:?}"))),
        };
        let (rows, cols) = match info.shape[..] {
            [cols] => (1, cols),
            [rows, cols] => (rows, cols),
            _ => return Err(ModelError::unsupported(path, name, format!("shape {:?}", info.shape))),
        };
        let (begin, length) = place.bytes();
        if encoding.bytes(rows, cols) != Some(length) {
            return Err(ModelError::invalid(path, name, format!("shape {:?} does not fit its {length} bytes", info.shape)));
        }
        Ok(Tensor::new(rows, cols, encoding, self.read(place, begin, length)?))
    }

    /// Whether two tensors are equal to the bit.
    ///
    /// # Errors
    /// When one is missing or cannot be read.
    pub fn same(&self, one: &str, other: &str) -> Result<bool, ModelError> {
        let (one, other) = (self.place(one)?, self.place(other)?);
        let ((mut here, mut left), (mut there, length)) = (one.bytes(), other.bytes());
        if (one.info.dtype, &one.info.shape, left) != (other.info.dtype, &other.info.shape, length) {
            return Ok(false);
        }
        while left > 0 {
            let piece = left.min(PIECE);
            if self.read(one, here, piece)? != self.read(other, there, piece)? {
                return Ok(false);
            }
            (here, there, left) = (here + piece as u64, there + piece as u64, left - piece);
        }
        Ok(true)
    }

    fn place(&self, name: &str) -> Result<&Place, ModelError> {
        self.tensors.get(name).ok_or_else(|| ModelError::invalid(&self.path, name, "tensor is missing"))
    }

    fn read(&self, place: &Place, begin: u64, length: usize) -> Result<Vec<u8>, ModelError> {
        let (path, file) = &self.files[place.file];
        read::read(path, file, begin, length)
    }
}

/// First byte of a file's data; name and entry of each of its tensors.
fn read_header(path: &Path, file: &File) -> Result<(u64, Vec<(String, TensorInfo)>), ModelError> {
    let invalid = |at: &str, problem: String| ModelError::invalid(path, at, problem);
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
        let info: TensorInfo = serde_json::from_value(value).map_err(|error| invalid(&name, error.to_string()))?;
        tensors.push((name, info));
    }
    tensors.sort_by_key(|(_, info)| info.data_offsets);
    check_coverage(path, &tensors, most - size)?;
    Ok((8 + size, tensors))
}

/// The format: every byte of the data belongs to one tensor. `tensors` are in the order of their offsets.
fn check_coverage(path: &Path, tensors: &[(String, TensorInfo)], length: u64) -> Result<(), ModelError> {
    let mut covered = 0;
    for (name, info) in tensors {
        let (begin, end) = (info.data_offsets.0 as u64, info.data_offsets.1 as u64);
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
