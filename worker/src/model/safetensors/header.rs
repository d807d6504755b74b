//! The head of a safetensors file. Its length is checked before anything is allocated by it.

use std::fmt;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use safetensors::tensor::TensorInfo;
use serde::de::{Error, IgnoredAny, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};

use crate::model::error::ModelError;

/// Longest header the format allows.
const MAX_HEADER: u64 = 100_000_000;

/// First byte of a file's data; name and entry of each of its tensors.
pub(super) fn read(path: &Path, file: &File) -> Result<(u64, Vec<(String, TensorInfo)>), ModelError> {
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
    let Entries(mut tensors) = serde_json::from_slice(&header).map_err(|error| invalid("header", error.to_string()))?;
    tensors.sort_by_key(|(_, info)| info.data_offsets);
    check_coverage(path, &tensors, most - size)?;
    Ok((8 + size, tensors))
}

/// Name and entry of each tensor. They are read as what they are: of a long list of something else, each entry would become 32 bytes.
struct Entries(Vec<(String, TensorInfo)>);

impl<'de> Deserialize<'de> for Entries {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(Self(Vec::new()))
    }
}

impl<'de> Visitor<'de> for Entries {
    type Value = Self;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut map: A) -> Result<Self, A::Error> {
        while let Some(name) = map.next_key::<String>()? {
            if name == "__metadata__" {
                map.next_value::<IgnoredAny>()?;
                continue;
            }
            let info = map.next_value().map_err(|error| A::Error::custom(format!("{name}: {error}")))?;
            self.0.push((name, info));
        }
        Ok(self)
    }
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
