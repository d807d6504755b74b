//! What can be wrong with a checkpoint.

use std::path::{Path, PathBuf};

/// A checkpoint that cannot be used; the text names the file and the key or tensor.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// A file could not be read.
    #[error("failed to read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file is damaged, cut short or contradicts itself.
    #[error("{}: {at}: {problem}", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// Key, field or tensor.
        at: String,
        /// What is wrong with it.
        problem: String,
    },
    /// The checkpoint is sound, but needs something this worker does not do.
    #[error("{}: {at}: {found} is not supported", path.display())]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// Key, field or tensor.
        at: String,
        /// The value found there.
        found: String,
    },
    /// The device did not take the weights.
    #[error(transparent)]
    Device(#[from] crate::kernel::DeviceError),
}

impl ModelError {
    pub(super) fn read(path: &Path) -> impl FnOnce(std::io::Error) -> Self + '_ {
        |source| Self::Read { path: path.to_owned(), source }
    }

    pub(super) fn invalid(path: &Path, at: impl Into<String>, problem: impl Into<String>) -> Self {
        Self::Invalid { path: path.to_owned(), at: at.into(), problem: problem.into() }
    }

    pub(super) fn unsupported(path: &Path, at: impl Into<String>, found: impl Into<String>) -> Self {
        Self::Unsupported { path: path.to_owned(), at: at.into(), found: found.into() }
    }
}
