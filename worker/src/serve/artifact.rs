//! A head that a gateway serves: the bytes of `head.safetensors`, checked, and as much of them as serving needs to know.

use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use carryon_crds::wire::head::{BASE_KEY, FORMAT_VERSION, SHAPE_KEY};
use carryon_crds::wire::{self, BaseReference, HeadShape};
use safetensors::SafeTensors;
use serde::de::DeserializeOwned;

/// Name of the weights' file in the artifact's folder.
pub(super) const FILE: &str = "head.safetensors";
/// A head is small; what is larger is something else.
const MAX_BYTES: u64 = 2 << 30;

/// The weights' file of a head, whose digest was verified: all that a gateway has of an artifact.
#[derive(Debug)]
pub(super) struct HeadFile {
    /// All of `head.safetensors`.
    pub(super) bytes: Bytes,
    /// Digest of `bytes`.
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
        cause: std::io::Error,
    },
    /// The file is too large to be a head.
    #[error("{path:?} has more than {MAX_BYTES} bytes")]
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
        let read_error = |cause| HeadFileError::Read { path: path.clone(), cause };
        let mut bytes = Vec::new();
        let file = File::open(&path).map_err(read_error)?;
        file.take(MAX_BYTES + 1).read_to_end(&mut bytes).map_err(read_error)?;
        if bytes.len() as u64 > MAX_BYTES {
            return Err(HeadFileError::TooLarge { path });
        }
        let digest = wire::digest(&bytes);
        if digest != expected {
            return Err(HeadFileError::Digest { path, expected: expected.to_owned(), found: digest });
        }
        let (shape, base) = describe(&bytes).map_err(|reason| HeadFileError::Format { path, reason })?;
        Ok(Self { bytes: bytes.into(), digest, shape, base })
    }
}

/// The metadata of the header; the weights are the pool's business.
fn describe(bytes: &[u8]) -> Result<(HeadShape, BaseReference), String> {
    let (_, header) = SafeTensors::read_metadata(bytes).map_err(|error| format!("it is no safetensors file: {error}"))?;
    let metadata = header.metadata().as_ref().ok_or("its header has no metadata")?;
    let shape: HeadShape = member(metadata.get(SHAPE_KEY), SHAPE_KEY)?;
    if shape.format_version != FORMAT_VERSION {
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
    use std::collections::HashMap;

    const SHAPE: &str = r#"{"format_version":1,"task":"CausalLM","taps":{"layers":[],"final":true},"hidden_size":4,"width":4,"blocks":1,"heads":1,
        "feed_forward":16,"gate":false,"alpha":1.0,"window":8,"rope_theta":10000.0,"norm_epsilon":1e-5}"#;
    const BASE: &str = r#"{"name":"b","identity":{"weights":"w","tokenizer":"t","chat_template":"","norm_point":"final_norm"}}"#;

    /// One without weights.
    pub(in crate::serve) fn artifact(digest: &str, task: &str) -> HeadFile {
        let shape = serde_json::from_str(&SHAPE.replace("CausalLM", task)).unwrap();
        HeadFile { bytes: Bytes::new(), digest: digest.to_owned(), shape, base: serde_json::from_str(BASE).unwrap() }
    }

    fn refusal(metadata: &[(&str, &str)]) -> Option<String> {
        let folder = tempfile::tempdir().unwrap();
        let metadata: HashMap<String, String> = metadata.iter().map(|(key, value)| (key.to_string(), value.to_string())).collect();
        let bytes = safetensors::serialize(HashMap::<String, safetensors::tensor::TensorView<'_>>::new(), Some(metadata)).unwrap();
        std::fs::write(folder.path().join(FILE), &bytes).unwrap();
        HeadFile::read(folder.path(), &wire::digest(&bytes)).err().map(|error| error.to_string())
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
        assert!(matches!(HeadFile::read(folder.path(), &wire::digest(b"x")), Err(HeadFileError::Format { .. })));
    }
}
