//! The head artifact: `head.safetensors` (complete in itself) and `head.json` beside it.

mod reader;

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};

use carryon_crds::pool;
use carryon_crds::wire::digest_of;
use carryon_crds::wire::head::{BASE_KEY, BaseReference, HeadManifest, HeadShape, SHAPE_KEY};
use carryon_crds::wire::limits::{MAX_HEAD_BYTES, head_bytes};
use safetensors::tensor::{Metadata, TensorView};
use safetensors::{Dtype, SafeTensorError, SafeTensors};
use serde::Serialize;
use serde::de::DeserializeOwned;
use sha2::{Digest as _, Sha256};

pub use self::reader::Reader;
use super::parameters::{self, ShapeError, Weight, Weights};
use crate::numbers::Values;
use crate::{files, tensor_file};

/// File name of the weights.
pub const WEIGHTS_FILE: &str = "head.safetensors";
/// File name of the manifest.
pub const MANIFEST_FILE: &str = "head.json";

const MAX_MANIFEST_BYTES: u64 = 16 << 20;

/// Bytes of [`WEIGHTS_FILE`] of a head of `shape`, at most.
pub fn weights_bytes(shape: &HeadShape) -> u64 {
    head_bytes(parameters::count(shape))
}

/// A head whose tensors are known to be those its shape asks for.
#[derive(Clone, Debug, PartialEq)]
pub struct Artifact {
    /// All that is needed, beside the weights, to run it.
    pub shape: HeadShape,
    /// The base it was trained on.
    pub base: BaseReference,
    /// Tensors by name.
    pub weights: Weights,
    /// Digest of [`Artifact::to_bytes`].
    pub digest: String,
}

/// Why an artifact was not read or written.
#[derive(Debug, thiserror::Error)]
pub enum ArtifactError {
    /// The file system refused.
    #[error("failed to {action} {path:?}: {source}")]
    File {
        /// `read` or `write`.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The file is longer than any head.
    #[error("{origin} has {bytes} bytes, more than {most}")]
    TooLarge {
        /// File, or where the bytes came from.
        origin: String,
        /// Its size.
        bytes: u64,
        /// The bound.
        most: u64,
    },
    /// Not safetensors, not JSON, or metadata missing.
    #[error("{origin}: {part} is invalid: {reason}")]
    Invalid {
        /// File, or where the bytes came from.
        origin: String,
        /// `header`, a metadata key, or `manifest`.
        part: &'static str,
        /// The cause.
        reason: String,
    },
    /// The shape is out of bounds.
    #[error("{origin}: the head's {source}")]
    Shape {
        /// File, or where the bytes came from.
        origin: String,
        /// Member and reason.
        source: ShapeError,
    },
    /// A tensor is missing, unknown, or of another type or shape.
    #[error("{origin}: tensor {name:?} {reason}")]
    Tensor {
        /// File, or where the bytes came from.
        origin: String,
        /// Name of the tensor.
        name: String,
        /// What is wrong.
        reason: String,
    },
    /// Weights and manifest do not belong together, or the bytes are not those that were asked for.
    #[error("{origin}: {member} is {found}, expected {expected}")]
    Mismatch {
        /// File, or where the bytes came from.
        origin: String,
        /// `digest`, `shape` or `base`.
        member: &'static str,
        /// As computed from the weights' file.
        found: String,
        /// As the manifest or the caller says.
        expected: String,
    },
}

impl Artifact {
    /// Binds weights to their shape and base, and names them by their digest.
    ///
    /// # Errors
    /// A shape out of bounds; a tensor that is missing, unknown or of another shape.
    pub fn new(shape: HeadShape, base: BaseReference, weights: Weights) -> Result<Self, ArtifactError> {
        let origin = "new head";
        let wanted = wanted_tensors(origin, &shape)?;
        check_names(origin, &wanted, weights.keys().map(String::as_str))?;
        for (name, weight) in &weights {
            check_tensor(origin, name, &weight.shape, &wanted[name])?;
            if weight.values.len() != weight.shape.iter().product::<usize>() {
                return Err(tensor_error(origin, name, format!("has {} values for shape {:?}", weight.values.len(), weight.shape)));
            }
        }
        let mut artifact = Self { shape, base, weights, digest: String::new() };
        let mut hasher = Sha256::new();
        artifact.pieces().for_each(|piece| hasher.update(piece));
        artifact.digest = digest_of(hasher);
        Ok(artifact)
    }

    /// The bytes of `head.safetensors`: equal for equal heads.
    pub fn to_bytes(&self) -> Vec<u8> {
        self.pieces().collect::<Vec<_>>().concat()
    }

    /// Those bytes in pieces: there may be no memory for the weights twice.
    fn pieces(&self) -> impl Iterator<Item = Cow<'_, [u8]>> {
        let tensors = self.weights.values().map(|weight| match weight.values.floats() {
            Cow::Borrowed(values) => Cow::Borrowed(bytemuck::cast_slice(values)),
            Cow::Owned(values) => Cow::Owned(bytemuck::cast_slice(&values).to_vec()),
        });
        std::iter::once(Cow::Owned(self.header())).chain(tensors)
    }

    /// What stands before the tensors.
    fn header(&self) -> Vec<u8> {
        let (base, shape) = (encode(&self.base), encode(&self.shape));
        let tensors = self.weights.iter().map(|(name, weight)| (name.as_str(), Dtype::F32, weight.shape.as_slice()));
        tensor_file::header(&[(BASE_KEY, &base), (SHAPE_KEY, &shape)], tensors)
    }

    /// Reads the bytes of `head.safetensors`; `origin` names them in errors.
    ///
    /// # Errors
    /// Anything but a complete head: see [`ArtifactError`]. Sizes are checked before weights are allocated.
    pub fn parse(origin: &str, bytes: &[u8]) -> Result<Self, ArtifactError> {
        let invalid = |error: SafeTensorError| invalid_header(origin, error.to_string());
        let (_, header) = SafeTensors::read_metadata(bytes).map_err(invalid)?;
        let (shape, base) = described(origin, &header)?;
        let tensors = SafeTensors::deserialize(bytes).map_err(invalid)?;
        let weight = |(name, view): (&str, TensorView<'_>)| {
            (name.to_owned(), Weight::new(view.shape().to_vec(), Values::from_bytes(view.data(), pool::Dtype::Float32)))
        };
        let weights = tensors.iter().map(weight).collect();
        Ok(Self { shape, base, weights, digest: carryon_crds::wire::digest(bytes) })
    }

    /// Refuses bytes other than those named `digest`.
    ///
    /// # Errors
    /// [`ArtifactError::Mismatch`].
    pub fn verify(&self, origin: &str, digest: &str) -> Result<(), ArtifactError> {
        if self.digest == digest { Ok(()) } else { Err(mismatch(origin, "digest", &self.digest, digest)) }
    }

    /// Number of parameters.
    pub fn parameters(&self) -> u64 {
        self.weights.values().map(|weight| weight.values.len() as u64).sum()
    }
}

/// Reads `head.safetensors` and `head.json` from `folder` and checks that they belong together.
///
/// # Errors
/// See [`ArtifactError`]; every error names the file.
pub fn read(folder: &Path) -> Result<(Artifact, HeadManifest), ArtifactError> {
    let manifest_path = folder.join(MANIFEST_FILE);
    let origin = manifest_path.display().to_string();
    let manifest: HeadManifest = decode(&origin, "manifest", &read_bounded(&manifest_path, MAX_MANIFEST_BYTES)?)?;
    let artifact = read_weights(&folder.join(WEIGHTS_FILE))?;
    artifact.verify(&origin, &manifest.digest)?;
    if artifact.shape != manifest.shape {
        return Err(mismatch(&origin, "shape", &encode(&artifact.shape), &encode(&manifest.shape)));
    }
    if artifact.base != manifest.base {
        return Err(mismatch(&origin, "base", &encode(&artifact.base), &encode(&manifest.base)));
    }
    Ok((artifact, manifest))
}

/// Reads one `head.safetensors`.
///
/// # Errors
/// See [`ArtifactError`]; every error names the file.
pub fn read_weights(path: &Path) -> Result<Artifact, ArtifactError> {
    Artifact::parse(&path.display().to_string(), &read_bounded(path, MAX_HEAD_BYTES)?)
}

/// Writes `head.safetensors`, then `head.json`.
///
/// # Errors
/// Those of [`write_weights`] and [`write_manifest`].
pub fn write(folder: &Path, artifact: &Artifact, manifest: &HeadManifest) -> Result<(), ArtifactError> {
    write_weights(folder, artifact)?;
    write_manifest(folder, artifact, manifest)
}

/// Writes `head.safetensors`, whole or not at all.
///
/// # Errors
/// The file cannot be written.
pub fn write_weights(folder: &Path, artifact: &Artifact) -> Result<(), ArtifactError> {
    let path = folder.join(WEIGHTS_FILE);
    let fill = |file: &mut File| artifact.pieces().try_for_each(|piece| file.write_all(&piece));
    files::write_atomic_with(&path, fill).map_err(|source| ArtifactError::File { action: "write", path, source })
}

/// Writes `head.json` beside its weights, whole or not at all.
///
/// # Errors
/// A manifest of another head; a file that cannot be written.
pub fn write_manifest(folder: &Path, artifact: &Artifact, manifest: &HeadManifest) -> Result<(), ArtifactError> {
    artifact.verify(MANIFEST_FILE, &manifest.digest)?;
    let path = folder.join(MANIFEST_FILE);
    let text = serde_json::to_string_pretty(manifest).expect("a manifest is plain data") + "\n";
    files::write_atomic(&path, text.as_bytes()).map_err(|source| ArtifactError::File { action: "write", path, source })
}

fn read_bounded(path: &Path, most: u64) -> Result<Vec<u8>, ArtifactError> {
    let failed = |source| ArtifactError::File { action: "read", path: path.into(), source };
    let file = File::open(path).map_err(failed)?;
    let bytes = file.metadata().map_err(failed)?.len();
    if bytes > most {
        return Err(ArtifactError::TooLarge { origin: path.display().to_string(), bytes, most });
    }
    let mut content = Vec::with_capacity(bytes as usize);
    file.take(most).read_to_end(&mut content).map_err(failed)?;
    Ok(content)
}

/// Shape and base of a head whose file begins with `header`; its tensors are those of such a head.
fn described(origin: &str, header: &Metadata) -> Result<(HeadShape, BaseReference), ArtifactError> {
    let metadata = header.metadata().clone().unwrap_or_default();
    let member = |key: &'static str| {
        let missing = || ArtifactError::Invalid { origin: origin.into(), part: key, reason: "is missing from the metadata".into() };
        metadata.get(key).ok_or_else(missing)
    };
    let shape: HeadShape = decode(origin, SHAPE_KEY, member(SHAPE_KEY)?.as_bytes())?;
    let base: BaseReference = decode(origin, BASE_KEY, member(BASE_KEY)?.as_bytes())?;
    let wanted = wanted_tensors(origin, &shape)?;
    let tensors: BTreeMap<_, _> = header.tensors().into_iter().collect();
    check_names(origin, &wanted, tensors.keys().map(String::as_str))?;
    for (name, info) in &tensors {
        if info.dtype != Dtype::F32 {
            return Err(tensor_error(origin, name, format!("has type {:?}, expected F32", info.dtype)));
        }
        check_tensor(origin, name, &info.shape, &wanted[name])?;
    }
    Ok((shape, base))
}

fn wanted_tensors(origin: &str, shape: &HeadShape) -> Result<BTreeMap<String, Vec<usize>>, ArtifactError> {
    parameters::check(shape).map_err(|source| ArtifactError::Shape { origin: origin.into(), source })?;
    Ok(parameters::of(shape))
}

fn check_names<'a>(origin: &str, wanted: &BTreeMap<String, Vec<usize>>, found: impl Iterator<Item = &'a str>) -> Result<(), ArtifactError> {
    let found: BTreeSet<&str> = found.collect();
    if let Some(name) = wanted.keys().find(|name| !found.contains(name.as_str())) {
        return Err(tensor_error(origin, name, "is missing".into()));
    }
    match found.into_iter().find(|name| !wanted.contains_key(*name)) {
        Some(name) => Err(tensor_error(origin, name, "is not part of a head of this shape".into())),
        None => Ok(()),
    }
}

fn check_tensor(origin: &str, name: &str, found: &[usize], wanted: &[usize]) -> Result<(), ArtifactError> {
    if found == wanted { Ok(()) } else { Err(tensor_error(origin, name, format!("has shape {found:?}, expected {wanted:?}"))) }
}

fn invalid_header(origin: &str, reason: String) -> ArtifactError {
    ArtifactError::Invalid { origin: origin.into(), part: "header", reason }
}

fn tensor_error(origin: &str, name: &str, reason: String) -> ArtifactError {
    ArtifactError::Tensor { origin: origin.into(), name: name.into(), reason }
}

fn mismatch(origin: &str, member: &'static str, found: &str, expected: &str) -> ArtifactError {
    ArtifactError::Mismatch { origin: origin.into(), member, found: found.into(), expected: expected.into() }
}

fn decode<T: DeserializeOwned>(origin: &str, part: &'static str, bytes: &[u8]) -> Result<T, ArtifactError> {
    serde_json::from_slice(bytes).map_err(|error| ArtifactError::Invalid { origin: origin.into(), part, reason: error.to_string() })
}

fn encode(value: &impl Serialize) -> String {
    serde_json::to_string(value).expect("wire types are plain data")
}
