//! A head's file, read one tensor after the other: there may be no memory for all of them beside those that are trained.

use std::fs::File;
use std::io::{self, Read as _};
use std::path::Path;

use carryon_crds::pool;
use carryon_crds::wire::digest_of;
use carryon_crds::wire::head::{BaseReference, HeadShape};
use carryon_crds::wire::limits::HEAD_HEADER_BYTES;
use safetensors::tensor::Metadata;
use sha2::{Digest as _, Sha256};

use super::{ArtifactError, described, invalid_header, mismatch};
use crate::head::Weight;
use crate::numbers::Values;

/// A file of which the header is read, and found to be that of a head.
pub struct Reader {
    /// As the file says.
    pub shape: HeadShape,
    /// The base it was trained on.
    pub base: BaseReference,
    origin: String,
    file: File,
    header: Metadata,
    hasher: Sha256,
}

impl Reader {
    /// Opens one `head.safetensors`.
    ///
    /// # Errors
    /// See [`ArtifactError`]; every error names the file.
    pub fn open(path: &Path) -> Result<Self, ArtifactError> {
        let origin = path.display().to_string();
        let failed = |source| failed(&origin, source);
        let mut file = File::open(path).map_err(failed)?;
        let length = file.metadata().map_err(failed)?.len();
        let mut prefix = [0; 8];
        let read = file.read_exact(&mut prefix);
        if let Some(error) = read.err().filter(|error| error.kind() != io::ErrorKind::UnexpectedEof) {
            return Err(failed(error));
        }
        let header_bytes = u64::from_le_bytes(prefix);
        if header_bytes > HEAD_HEADER_BYTES || header_bytes + 8 > length {
            return Err(invalid_header(&origin, format!("a header of {header_bytes} bytes in a file of {length}")));
        }
        let mut text = vec![0; header_bytes as usize];
        file.read_exact(&mut text).map_err(failed)?;
        let header: Metadata = serde_json::from_slice(&text).map_err(|error| invalid_header(&origin, error.to_string()))?;
        let (shape, base) = described(&origin, &header)?;
        let mut next = 0;
        for name in header.offset_keys() {
            let (begin, end) = header.info(&name).map_or((0, 0), |info| info.data_offsets);
            let values: usize = header.info(&name).map_or(0, |info| info.shape.iter().product());
            if begin != next || end != begin + 4 * values {
                return Err(invalid_header(&origin, format!("tensor {name:?} lies at {begin}..{end}")));
            }
            next = end;
        }
        if header_bytes + 8 + next as u64 != length {
            return Err(invalid_header(&origin, format!("{length} bytes are not as many as it says")));
        }
        let mut hasher = Sha256::new_with_prefix(prefix);
        hasher.update(&text);
        Ok(Self { shape, base, origin, file, header, hasher })
    }

    /// Hands out all tensors, in the order of the file.
    ///
    /// # Errors
    /// The file cannot be read, or was not the one that is named `digest`: then what was handed out is not to be used.
    pub fn read(mut self, digest: &str, mut take: impl FnMut(&str, Weight)) -> Result<(), ArtifactError> {
        for name in self.header.offset_keys() {
            let Some(info) = self.header.info(&name) else { continue };
            let mut bytes = vec![0; info.data_offsets.1 - info.data_offsets.0];
            self.file.read_exact(&mut bytes).map_err(|source| failed(&self.origin, source))?;
            self.hasher.update(&bytes);
            take(&name, Weight::new(info.shape.clone(), Values::from_bytes(&bytes, pool::Dtype::Float32)));
        }
        let found = digest_of(self.hasher);
        if found == digest { Ok(()) } else { Err(mismatch(&self.origin, "digest", &found, digest)) }
    }
}

fn failed(origin: &str, source: io::Error) -> ArtifactError {
    ArtifactError::File { action: "read", path: origin.into(), source }
}
