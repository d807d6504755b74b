//! A head that a gateway serves: the bytes of `head.safetensors`, checked, and as much of them as serving needs to know.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use carryon_crds::wire::head::{BASE_KEY, FORMAT_VERSION, SHAPE_KEY};
use carryon_crds::wire::limits::{HEAD_HEADER_BYTES, MAX_HEAD_BYTES};
use carryon_crds::wire::{BaseReference, HeadShape, digest_of};
use safetensors::tensor::Metadata;
use serde::de::DeserializeOwned;
use sha2::{Digest as _, Sha256};

use crate::exchange::Payload;

/// Name of the weights' file in the artifact's folder.
pub(super) const FILE: &str = "head.safetensors";
/// Bytes of it that are read at a time.
const READ_BYTES: usize = 1 << 20;

/// The weights' file of a head, whose digest was verified: all that a gateway has of an artifact.
#[derive(Debug)]
pub(super) struct HeadFile {
    /// `head.safetensors`. It stays on its volume: only the pool needs its weights.
    pub(super) path: PathBuf,
    /// Its bytes.
    pub(super) length: u64,
    /// Digest of them.
    pub(super) digest: String,
    /// Shape, from the metadata.
    pub(super) shape: HeadShape,
    /// The base it was trained on, from the metadata.
    pub(super) base: BaseReference,
}

/// Why a head cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum HeadFileError {
    /// The file cannot be read.
    #[error("failed to read {path:?}: {cause}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What went wrong.
        cause: io::Error,
    },
    /// The file is too large to be a head.
    #[error("{path:?} has more than {MAX_HEAD_BYTES} bytes")]
    TooLarge {
        /// The file.
        path: PathBuf,
    },
    /// The bytes are others than those asked for.
    #[error("{path:?} has digest {found}, expected {expected}")]
    Digest {
        /// The file.
        path: PathBuf,
        /// Digest of the configuration.
        expected: String,
        /// Digest of the file.
        found: String,
    },
    /// The header is not that of a head.
    #[error("{path:?}: {reason}")]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
}

impl HeadFile {
    /// Reads `folder/head.safetensors` and checks that its digest is `expected`.
    pub(super) fn read(folder: &Path, expected: &str) -> Result<Self, HeadFileError> {
        let path = folder.join(FILE);
        let read = File::open(&path).and_then(|file| read(file.take(MAX_HEAD_BYTES + 1)));
        let (header, length, digest) = read.map_err(|cause| HeadFileError::Read { path: path.clone(), cause })?;
        if length > MAX_HEAD_BYTES {
            return Err(HeadFileError::TooLarge { path });
        }
        if digest != expected {
            return Err(HeadFileError::Digest { path, expected: expected.to_owned(), found: digest });
        }
        let (shape, base) = describe(&header).map_err(|reason| HeadFileError::Format { path: path.clone(), reason })?;
        Ok(Self { path, length, digest, shape, base })
    }

    /// What is sent to a pool, which verifies the digest too.
    pub(super) fn payload(&self) -> Payload {
        Payload::File { path: self.path.clone(), length: self.length }
    }
}

/// Enough for the header, length and digest of `file`, read once.
fn read(mut file: impl Read) -> io::Result<(Vec<u8>, u64, String)> {
    let (mut header, mut hasher, mut length) = (Vec::new(), Sha256::new(), 0);
    (&mut file).take(HEAD_HEADER_BYTES).read_to_end(&mut header)?;
    let mut piece = header.clone();
    while !piece.is_empty() {
        hasher.update(&piece);
        length += piece.len() as u64;
        piece.clear();
        (&mut file).take(READ_BYTES as u64).read_to_end(&mut piece)?;
    }
    Ok((header, length, digest_of(hasher)))
}

/// The metadata of a header, of which `bytes` are the file's first; the weights are the pool's business.
fn describe(bytes: &[u8]) -> Result<(HeadShape, BaseReference), String> {
    let (length, rest) = bytes.split_first_chunk().ok_or("it is no safetensors file: it is too short")?;
    let header = usize::try_from(u64::from_le_bytes(*length)).ok().and_then(|length| rest.get(..length));
    let header = header.ok_or_else(|| format!("its header is not within the first {HEAD_HEADER_BYTES} bytes"))?;
    let header: Metadata = serde_json::from_slice(header).map_err(|error| format!("it is no safetensors file: {error}"))?;
    let metadata = header.metadata().as_ref().ok_or("its header has no metadata")?;
    let shape: HeadShape = member(metadata.get(SHAPE_KEY), SHAPE_KEY)?;
    if !(1..=FORMAT_VERSION).contains(&shape.format_version) {
        return Err(format!("its format version is {}, this worker reads {FORMAT_VERSION}", shape.format_version));
    }
    Ok((shape, member(metadata.get(BASE_KEY), BASE_KEY)?))
}

fn member<T: DeserializeOwned>(text: Option<&String>, key: &str) -> Result<T, String> {
    let text = text.ok_or_else(|| format!("its metadata lacks {key:?}"))?;
    serde_json::from_str(text).map_err(|error| format!("metadata {key:?}: {error}"))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use carryon_crds::wire::digest;
    use std::collections::HashMap;

    const SHAPE: &str = r#"{"format_version":1,"task":"CausalLM","taps":{"layers":[],"final":true},"hidden_size":4,"width":4,"blocks":1,"heads":1,
        "feed_forward":16,"gate":false,"alpha":1.0,"window":8,"rope_theta":10000.0,"norm_epsilon":1e-5}"#;
    const BASE: &str = r#"{"name":"b","identity":{"weights":"w","tokenizer":"t","chat_template":"","norm_point":"final_norm"}}"#;

    /// One without weights.
    pub(in crate::serve) fn artifact(digest: &str, task: &str) -> HeadFile {
        let shape = serde_json::from_str(&SHAPE.replace("CausalLM", task)).unwrap();
        HeadFile { path: PathBuf::new(), length: 0, digest: digest.to_owned(), shape, base: serde_json::from_str(BASE).unwrap() }
    }

    fn refusal(metadata: &[(&str, &str)]) -> Option<String> {
        let folder = tempfile::tempdir().unwrap();
        let metadata: HashMap<String, String> = metadata.iter().map(|(key, value)| (key.to_string(), value.to_string())).collect();
        let bytes = safetensors::serialize(HashMap::<String, safetensors::tensor::TensorView<'_>>::new(), Some(metadata)).unwrap();
        std::fs::write(folder.path().join(FILE), &bytes).unwrap();
        HeadFile::read(folder.path(), &digest(&bytes)).err().map(|error| error.to_string())
    }

    #[test]
    fn reads_a_head_and_names_what_is_wrong_with_another() {
        assert_eq!(refusal(&[(SHAPE_KEY, SHAPE), (BASE_KEY, BASE)]), None);
        assert!(refusal(&[(SHAPE_KEY, SHAPE)]).unwrap().ends_with(r#"its metadata lacks "carryon.base""#));
        assert!(refusal(&[(SHAPE_KEY, "{}"), (BASE_KEY, BASE)]).unwrap().contains(r#"metadata "carryon.head": missing field"#));
        let later = SHAPE.replace("\"format_version\":1", "\"format_version\":9");
        assert!(refusal(&[(SHAPE_KEY, &later), (BASE_KEY, BASE)]).unwrap().contains("format version is 9"));
    }

    #[test]
    fn other_bytes_than_those_asked_for_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        assert!(matches!(HeadFile::read(folder.path(), "sha256:x"), Err(HeadFileError::Read { .. })));
        std::fs::write(folder.path().join(FILE), b"x").unwrap();
        assert!(matches!(HeadFile::read(folder.path(), "sha256:x"), Err(HeadFileError::Digest { .. })));
        assert!(matches!(HeadFile::read(folder.path(), &digest(b"x")), Err(HeadFileError::Format { .. })));
    }
}
