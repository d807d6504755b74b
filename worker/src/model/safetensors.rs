//! Folders in Hugging Face's layout: `config.json` and one or more `*.safetensors`.

mod header;

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use safetensors::Dtype;
use safetensors::tensor::TensorInfo;

use super::encoding::Encoding;
use super::error::ModelError;
use super::shards::{self, INDEX, Shards};
use super::tensor::{SCALED_BLOCK, Tensor};

/// Bytes of two tensors that are compared at a time.
const PIECE: usize = 1 << 20;

/// The tensors of a folder.
pub struct Folder {
    path: PathBuf,
    /// The files that hold the weights, sorted by name.
    pub files: Vec<(PathBuf, Arc<File>)>,
    tensors: BTreeMap<String, Place>,
    /// Scales of blocks, by the name of the tensor whose values they multiply: no tensors of their own.
    scales: BTreeMap<String, Place>,
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
    /// When there is none, one is missing, or a header is damaged or contradicts its file, another or the index.
    pub fn open(path: &Path, text_only: bool) -> Result<Self, ModelError> {
        let Shards { files: paths, weight_map } = shards::find(path)?;
        let (mut files, mut tensors) = (Vec::new(), BTreeMap::<String, Place>::new());
        for (index, path) in paths.into_iter().enumerate() {
            let file = File::open(&path).map_err(ModelError::read(&path))?;
            let (start, infos) = header::read(&path, &file)?;
            files.push((path, Arc::new(file)));
            for (name, info) in infos {
                if let Some(place) = tensors.insert(name.clone(), Place { file: index, start, info }) {
                    let other = files[place.file].0.display();
                    return Err(ModelError::invalid(&files[index].0, name, format!("tensor appears twice, the other is in {other}")));
                }
            }
        }
        for (name, file) in weight_map {
            let place = path.join(file);
            if tensors.get(&name).is_none_or(|tensor| files[tensor.file].0 != place) {
                return Err(ModelError::invalid(&place, name, format!("{INDEX} says that this tensor is here, but it is not")));
            }
        }
        if text_only {
            tensors = text_part(tensors);
        }
        let scaled = tensors.iter().filter(|(_, place)| place.info.dtype == Dtype::F8_E4M3).map(|(name, _)| name.clone());
        let scaled: Vec<String> = scaled.collect();
        let scales = scaled.into_iter().filter_map(|name| tensors.remove(&scale_name(&name)).map(|place| (name, place))).collect();
        Ok(Self { path: path.to_owned(), files, tensors, scales })
    }

    /// Names of all tensors.
    pub fn tensor_names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// The file that holds the tensor `name`; the folder when none does.
    pub fn file_of(&self, name: &str) -> &Path {
        self.tensors.get(name).map_or(&self.path, |place| &self.files[place.file].0)
    }

    /// Reads the tensor `name`; values of 8 bits together with the scales of their blocks.
    ///
    /// # Errors
    /// When it or its scales are missing, not of a supported number type, or their sizes contradict their shapes.
    pub fn tensor(&self, name: &str) -> Result<Tensor, ModelError> {
        let place = self.place(name)?;
        let tensor = self.values(name, place)?;
        if place.info.dtype != Dtype::F8_E4M3 {
            return Ok(tensor);
        }
        let (path, at) = (&self.files[place.file].0, scale_name(name));
        let Some(place) = self.scales.get(name) else {
            return Err(ModelError::invalid(path, at, format!("tensor is missing, but {name} has values of 8 bits")));
        };
        let path = &self.files[place.file].0;
        if place.info.dtype == Dtype::F8_E4M3 {
            return Err(ModelError::unsupported(path, at, "number type F8_E4M3 of scales"));
        }
        let blocks = [tensor.rows.div_ceil(SCALED_BLOCK), tensor.cols.div_ceil(SCALED_BLOCK)];
        if place.info.shape != blocks {
            let problem = format!("shape {:?} is not {blocks:?}, a scale for each block of {name}", place.info.shape);
            return Err(ModelError::invalid(path, at, problem));
        }
        tensor.with_block_scales(&self.values(&at, place)?)
    }

    /// Reads the values of the tensor `name` at `place` as they are stored.
    fn values(&self, name: &str, place: &Place) -> Result<Tensor, ModelError> {
        let (path, info) = (&self.files[place.file].0, &place.info);
        let encoding = match info.dtype {
            Dtype::F32 => Encoding::F32,
            Dtype::F16 => Encoding::F16,
            Dtype::BF16 => Encoding::Bf16,
            Dtype::F8_E4M3 => Encoding::F8E4M3,
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
        Ok(Tensor::new(rows, cols, encoding, path, &self.files[place.file].1, begin))
    }

    /// Whether two tensors are equal to the bit, their scales too.
    ///
    /// # Errors
    /// When one is missing or cannot be read.
    pub fn same(&self, one: &str, other: &str) -> Result<bool, ModelError> {
        Ok(self.same_values(self.place(one)?, self.place(other)?)?
            && match (self.scales.get(one), self.scales.get(other)) {
                (Some(one), Some(other)) => self.same_values(one, other)?,
                (one, other) => one.is_none() && other.is_none(),
            })
    }

    fn same_values(&self, one: &Place, other: &Place) -> Result<bool, ModelError> {
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
        let ((path, file), mut bytes) = (&self.files[place.file], vec![0; length]);
        file.read_exact_at(&mut bytes, begin).map_err(ModelError::read(path))?;
        Ok(bytes)
    }
}

/// The tensors of a language model within another model, under the names that they have without it; all where there is none.
fn text_part(tensors: BTreeMap<String, Place>) -> BTreeMap<String, Place> {
    // As transformers writes them today, and as they were before.
    let own = |name: &str| match name.strip_prefix("model.language_model.") {
        Some(rest) => Some(format!("model.{rest}")),
        None => name.strip_prefix("language_model.").or(Some(name).filter(|name| name.starts_with("lm_head."))).map(str::to_owned),
    };
    if !tensors.keys().any(|name| name.contains("language_model.")) {
        return tensors;
    }
    tensors.into_iter().filter_map(|(name, place)| own(&name).map(|own| (own, place))).collect()
}

/// Name of the scales of the tensor `name`.
fn scale_name(name: &str) -> String {
    format!("{name}_scale_inv")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// PyTorch's `float8_e4m3fn`, and its values times their scales (`tests/oracles/formats.py`).
    #[test]
    fn values_of_eight_bits_are_those_of_pytorch() {
        let folder = Folder::open(Path::new("../tests/oracles/fixtures/f8_blocks"), false).unwrap();
        let rows = |name: &str| {
            let tensor = folder.tensor(name).unwrap();
            let mut values = vec![vec![0.0; tensor.cols]; tensor.rows];
            values.iter_mut().enumerate().for_each(|(row, values)| tensor.row(row, values));
            values
        };
        let bits = |values: &[f32]| values.iter().map(|value| if value.is_nan() { u32::MAX } else { value.to_bits() }).collect::<Vec<_>>();
        for (name, kept) in [("bytes", &[0, 1][..]), ("matrix", &[0, 127, 128, 129]), ("narrow", &[0, 1, 2])] {
            let (found, expected) = (rows(&format!("{name}.weight")), rows(&format!("{name}.expected")));
            assert_eq!(expected.len(), kept.len());
            for (row, expected) in kept.iter().zip(&expected) {
                assert_eq!(bits(&found[*row]), bits(expected), "{name}, row {row}");
            }
        }
        assert_eq!(folder.tensor_names().filter(|name| name.contains("scale")).count(), 0);
    }

    #[test]
    fn tensors_with_other_scales_are_not_the_same() {
        let folder = Folder::open(Path::new("../tests/oracles/fixtures/f8_blocks"), false).unwrap();
        assert!(folder.same("bytes.weight", "same.weight").unwrap());
        assert!(!folder.same("bytes.weight", "other.weight").unwrap());
        assert!(!folder.same("bytes.weight", "matrix.weight").unwrap());
    }
}
