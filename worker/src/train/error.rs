//! What can go wrong in a trainer, and the exit code each failure maps to.

use std::io;
use std::path::PathBuf;

use carryon_crds::wire::ExitCode;

/// Why a trainer ended without a head.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// The data are wrong: names file, line and field.
    #[error(transparent)]
    Data(#[from] DataError),
    /// The configuration does not fit the model or the data.
    #[error("{0}")]
    Configuration(String),
    /// A file of the output folder could not be read or written.
    #[error("failed to {action} {path:?}: {cause}")]
    File {
        /// What was tried, e.g. `write`.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        cause: io::Error,
    },
    /// The pool did not answer, or not as it should.
    #[error("pool: {0}")]
    Pool(String),
    /// The pool runs another base than the one this run began with.
    #[error("the pool's base model changed while training: {member} is not the one this job began with")]
    IdentityChanged {
        /// Member of [`carryon_crds::wire::Identity`] that differs, or the pool's words.
        member: String,
    },
    /// A loss or gradient is not a number.
    #[error("{what} of step {step} is {value}: training diverged; lower training.learningRate or training.muonLearningRate")]
    NotFinite {
        /// `loss` or `gradient norm`.
        what: &'static str,
        /// Optimizer step, from 1.
        step: u64,
        /// NaN or an infinity.
        value: f64,
    },
    /// The untrained head does not leave the base's loss alone.
    #[error("loss of the untrained head is {head}, the base's own is {base}: they must be equal before the first step")]
    StepZero {
        /// Head's loss, nats per target.
        head: f64,
        /// Base's loss, nats per target.
        base: f64,
    },
    /// The output folder is not this trainer's any more.
    #[error("another trainer has taken over the output folder, or the lease on it could not be renewed: this one writes no more")]
    FolderTaken,
    /// Head, tape or optimizer failed.
    #[error("{0}")]
    Head(String),
    /// SIGTERM or SIGINT came; the last finished step, if there is one, is checkpointed.
    #[error("stopped on request at step {step}; the next start goes on from the last checkpoint")]
    Stopped {
        /// Optimizer steps done.
        step: u64,
    },
}

impl TrainError {
    /// A file-system failure at `path`.
    pub fn file(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |cause| Self::File { action, path, cause }
    }

    /// Whether a volume had no room for a file.
    pub fn is_no_room(&self) -> bool {
        matches!(self, Self::File { cause, .. } if matches!(cause.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded))
    }

    /// Exit code of the process.
    pub fn exit_code(&self) -> ExitCode {
        match self {
            Self::Data(DataError::Read { .. }) => ExitCode::Retryable,
            Self::Data(_) => ExitCode::Data,
            // The same steps lead to the same numbers.
            Self::Configuration(_) | Self::IdentityChanged { .. } | Self::NotFinite { .. } => ExitCode::Configuration,
            Self::Stopped { .. } => ExitCode::Resume,
            Self::File { .. } | Self::Pool(_) | Self::StepZero { .. } | Self::FolderTaken | Self::Head(_) => ExitCode::Retryable,
        }
    }
}

/// What is wrong with a data file. Lines count from 1.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// The file is not there.
    #[error("data file {path:?} does not exist")]
    Missing {
        /// The file.
        path: PathBuf,
    },
    /// A folder is named where a file is meant.
    #[error("data file {path:?} is a folder, and no data set that `datasets` would find in it: name its files, or {}", path.join("*.jsonl").display())]
    Folder {
        /// The folder.
        path: PathBuf,
    },
    /// No file has a name of this form.
    #[error("no data file matches {path:?}")]
    NoMatch {
        /// The pattern.
        path: PathBuf,
    },
    /// The file could not be read.
    #[error("failed to read data file {path:?}: {cause}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        cause: io::Error,
    },
    /// The file is larger than [`super::data::MAX_FILE_BYTES`].
    #[error("data file {path:?} has {bytes} bytes, more than the {limit} a trainer reads")]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Its size.
        bytes: u64,
        /// The bound.
        limit: u64,
    },
    /// One line is wrong.
    #[error("{path:?} {unit} {line}{}: {problem}", column.map(|column| format!(", column {column}")).unwrap_or_default())]
    Line {
        /// The file.
        path: PathBuf,
        /// `line`, or `row` of a table.
        unit: &'static str,
        /// Its number, from 1.
        line: u64,
        /// Character of the line, from 1, where one is to blame.
        column: Option<u64>,
        /// What is wrong with it; names the field.
        problem: String,
        /// Whether it is more than this line's trouble.
        whole: bool,
    },
    /// A table, or a description of a data set, cannot be read.
    #[error("data file {path:?} is damaged: {problem}")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// A data set's folder does not hold what is asked for.
    #[error("data folder {path:?}: {problem}")]
    Layout {
        /// The folder.
        path: PathBuf,
        /// What is missing or contradictory.
        problem: String,
    },
    /// Nothing to learn from.
    #[error("data file {} holds no usable sample ({lines} lines, {skipped} left out{})", names(paths), first.as_ref().map(|first| format!("; the first: {first}")).unwrap_or_default())]
    Empty {
        /// The files.
        paths: Vec<PathBuf>,
        /// Lines read.
        lines: u64,
        /// Lines left out by policy.
        skipped: u64,
        /// What was wrong with the first that could not be read.
        first: Option<String>,
    },
}

fn names(paths: &[PathBuf]) -> String {
    paths.iter().map(|path| format!("{path:?}")).collect::<Vec<_>>().join(", ")
}
