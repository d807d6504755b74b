//! The beginning of a GGUF file says what model it is: it is looked at as soon as it is there, for there is no use for weights that nobody can read.

use std::path::Path;

use super::error::FetchError;
use super::plan::{self, RemoteFile};
use crate::model;

/// Bytes after which a file is looked at for the first time; after as many again it is the next time.
const FIRST: u64 = 1 << 20;

/// When a file is looked at next.
pub struct Head {
    /// Bytes that have to be there; none when there is nothing more to see.
    due: Option<u64>,
}

impl Head {
    /// Of a GGUF file, or of the first of several that are one, which alone says what they are.
    pub fn of(file: &RemoteFile) -> Self {
        Self { due: (file.name.ends_with(".gguf") && plan::is_first(&file.name)).then_some(FIRST) }
    }

    /// Looks at the beginning of `file` at `path`, of which `length` bytes are there, when it is time.
    ///
    /// # Errors
    /// No pool can run it.
    pub fn look(&mut self, path: &Path, file: &RemoteFile, length: u64) -> Result<(), FetchError> {
        let Some(due) = self.due.filter(|due| length >= file.size.min(*due)) else { return Ok(()) };
        let enough = model::check_gguf(path, file.size).map_err(|error| FetchError::Unsupported(error.to_string()))?;
        self.due = (!enough).then_some(due.max(length).saturating_mul(2));
        Ok(())
    }
}
