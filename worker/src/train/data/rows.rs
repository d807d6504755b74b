//! The records of one file of any kind, each as the text of a JSON object.

use std::io::Read as _;
use std::path::Path;

use super::lines::{self, Lines};
use super::problem::Problem;
use super::table::{self, Table};
use crate::train::error::DataError;

/// What a file holds; which kind it is, its first bytes say, not its name.
pub enum Rows {
    /// JSON Lines.
    Lines(Lines),
    /// Parquet, or Arrow as `datasets` saves it.
    Table(Table),
}

impl Rows {
    /// Opens `path`.
    ///
    /// # Errors
    /// A file that is missing, too large, or damaged where it says what it holds.
    pub fn open(path: &Path) -> Result<Self, DataError> {
        let mut file = lines::open(path)?;
        let mut start = Vec::new();
        (&mut file).take(4).read_to_end(&mut start).map_err(|cause| DataError::Read { path: path.to_owned(), cause })?;
        match start.as_slice() {
            table::PARQUET => Ok(Self::Table(Table::parquet(path, file)?)),
            table::ARROW_STREAM => Ok(Self::Table(Table::arrow(path, file)?)),
            _ => Ok(Self::Lines(Lines::open(path)?)),
        }
    }

    /// The next record; None behind the last.
    ///
    /// # Errors
    /// One that cannot be read: behind it the next one is returned, unless the error concerns the whole file.
    pub fn next_row(&mut self) -> Result<Option<&str>, DataError> {
        match self {
            Self::Lines(lines) => lines.next_line(),
            Self::Table(table) => table.next_row(),
        }
    }

    /// Number of the record last returned, from 1.
    pub fn number(&self) -> u64 {
        match self {
            Self::Lines(lines) => lines.number(),
            Self::Table(table) => table.number(),
        }
    }

    /// How many there are, once None was returned; blank lines count.
    pub fn count(&self) -> u64 {
        match self {
            Self::Lines(lines) => lines.number() - 1,
            Self::Table(table) => table.number(),
        }
    }

    /// Bytes of the file that have been used, of a table about.
    pub fn bytes(&self) -> u64 {
        match self {
            Self::Lines(lines) => lines.bytes(),
            Self::Table(table) => table.bytes(),
        }
    }

    /// An error at the record last returned.
    pub fn error(&self, problem: impl Into<Problem>) -> DataError {
        match self {
            Self::Lines(lines) => lines.error(problem),
            Self::Table(table) => table.error(problem),
        }
    }
}
