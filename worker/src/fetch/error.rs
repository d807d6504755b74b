//! What can go wrong while a model is fetched, and the exit code each failure maps to.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use carryon_crds::wire::{ExitCode, FetchFailure};
use indicatif::DecimalBytes;

/// Why no model was fetched.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// The arguments do not fit each other, the source or the folder.
    #[error("{0}")]
    Configuration(String),
    /// A file of the folder could not be read or written.
    #[error("failed to {action} {path:?}: {cause}")]
    File {
        /// What was tried, e.g. `write`.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        cause: io::Error,
    },
    /// The volume is too small.
    #[error("no room in {folder:?}: {} more are needed ({needed} bytes), {} are free ({free} bytes)", DecimalBytes(*.needed), DecimalBytes(*.free))]
    NoRoom {
        /// Where the model goes.
        folder: PathBuf,
        /// Bytes that have yet to be written.
        needed: u64,
        /// Bytes that the volume has for this user.
        free: u64,
    },
    /// The source says no, and will say so again.
    #[error("{0}")]
    Refused(String),
    /// No token or credentials, or none that may read it.
    #[error("{0}")]
    Denied(String),
    /// There is no such repository, revision, bucket or file.
    #[error("{0}")]
    Missing(String),
    /// No authority that is trusted has signed its certificate.
    #[error("{0}")]
    Untrusted(String),
    /// The authorities of one's own cannot be read.
    #[error("--ca-bundle {path:?}: {cause}")]
    CaBundle {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        cause: String,
    },
    /// No decoder of ours runs such a model.
    #[error("no pool can run it: {0}")]
    Unsupported(String),
    /// The source did not answer, or broke off; it may do better the next time.
    #[error("{what}: {cause}")]
    Unreachable {
        /// What was asked for.
        what: String,
        /// What happened.
        cause: String,
        /// How long the source wants to be left alone.
        after: Option<Duration>,
    },
    /// The file at the source is not the one that was begun.
    #[error("{name} has changed at its source while it was fetched")]
    Changed {
        /// Name of the file.
        name: String,
    },
    /// What came is not what the source promised.
    #[error("{name} is damaged: its SHA-256 is {found}, its source promised {expected}")]
    Digest {
        /// Name of the file.
        name: String,
        /// Hexadecimal.
        expected: String,
        /// Hexadecimal.
        found: String,
    },
    /// SIGTERM or SIGINT came.
    #[error("stopped on request; the next start goes on where this one was")]
    Stopped,
}

impl FetchError {
    /// A file-system failure at `path`.
    pub fn file(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |cause| Self::File { action, path, cause }
    }

    /// A failure that may pass.
    pub fn unreachable(what: impl Into<String>, cause: impl ToString) -> Self {
        Self::Unreachable { what: what.into(), cause: cause.to_string(), after: None }
    }

    /// Whether a volume had no room for a file.
    pub fn is_no_room(&self) -> bool {
        matches!(self, Self::File { cause, .. } if matches!(cause.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded))
    }

    /// Whether the source has said no to one question, and will again.
    pub fn is_refusal(&self) -> bool {
        matches!(self, Self::Refused(_) | Self::Denied(_) | Self::Missing(_) | Self::Untrusted(_))
    }

    /// What the operator is told; none when nothing is wrong.
    pub fn failure(&self) -> Option<FetchFailure> {
        Some(match self {
            Self::Stopped => return None,
            Self::Denied(_) => FetchFailure::AccessDenied,
            Self::Missing(_) => FetchFailure::NotFound,
            Self::Untrusted(_) => FetchFailure::Untrusted,
            Self::CaBundle { .. } => FetchFailure::CaBundle,
            Self::Unsupported(_) => FetchFailure::Unsupported,
            Self::Unreachable { .. } => FetchFailure::Unreachable,
            Self::Digest { .. } => FetchFailure::Damaged,
            Self::NoRoom { .. } => FetchFailure::VolumeFull,
            Self::File { .. } if self.is_no_room() => FetchFailure::VolumeFull,
            Self::File { cause, .. } if is_read_only(cause) => FetchFailure::VolumeReadOnly,
            Self::Configuration(_) | Self::Refused(_) | Self::File { .. } | Self::Changed { .. } => FetchFailure::Other,
        })
    }

    /// Exit code of the process.
    pub fn exit_code(&self) -> ExitCode {
        match self {
            Self::Configuration(_) | Self::Refused(_) | Self::Denied(_) | Self::Missing(_) => ExitCode::Configuration,
            Self::Untrusted(_) | Self::CaBundle { .. } | Self::Unsupported(_) => ExitCode::Configuration,
            Self::Digest { .. } => ExitCode::Data,
            Self::Stopped => ExitCode::Resume,
            Self::File { .. } | Self::NoRoom { .. } | Self::Unreachable { .. } | Self::Changed { .. } => ExitCode::Retryable,
        }
    }
}

fn is_read_only(cause: &io::Error) -> bool {
    matches!(cause.kind(), io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem)
}

/// An error with those beneath it: clients' own words are seldom the ones that help.
pub fn words(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}
