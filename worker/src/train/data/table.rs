//! Parquet files and the Arrow streams that `datasets` saves, a few rows at a time, each as the JSON object that a line would be.

use std::fs::File;
use std::io::{BufReader, Read, Seek as _, SeekFrom};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use arrow_array::RecordBatch;
use arrow_ipc::reader::StreamReader;
use arrow_json::WriterBuilder;
use arrow_json::writer::LineDelimited;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use parquet::file::metadata::ParquetMetaData;

use super::lines::MAX_LINE_BYTES;
use super::problem::Problem;
use crate::train::error::DataError;

/// How a Parquet file begins.
pub const PARQUET: &[u8] = b"PAR1";
/// How a stream of Arrow messages begins.
pub const ARROW_STREAM: &[u8] = b"\xff\xff\xff\xff";

/// Rows that are JSON at one time: so many bytes of them in the file's own form, as it says itself.
const BYTES_AT_ONCE: u64 = 4 << 20;
/// The same, at most.
const ROWS_AT_ONCE: u64 = 1024;
/// Longest description of a file's contents, bytes.
const MAX_METADATA_BYTES: u64 = 64 << 20;
/// Largest group of rows that an Arrow stream may hold in one piece, bytes; `datasets` writes a thousand rows in each.
const MAX_BATCH_BYTES: u64 = 256 << 20;

type Batches = Box<dyn Iterator<Item = Result<RecordBatch, String>>>;

/// The rows of one file.
pub struct Table {
    path: PathBuf,
    batches: Batches,
    /// What is left of the last batch, and how many rows of it become JSON at one time.
    batch: Option<(RecordBatch, usize)>,
    /// JSON of some rows, a line each, of which those before `next` were returned.
    text: Vec<u8>,
    next: usize,
    number: u64,
    /// Of the file; and in all rows of it, where it says so.
    file_bytes: u64,
    rows: Option<u64>,
}

impl Table {
    /// Opens a Parquet file.
    pub fn parquet(path: &Path, mut file: File) -> Result<Self, DataError> {
        let bytes = size(path, &file)?;
        check_footer(&mut file, bytes).map_err(|problem| damaged(path, &problem))?;
        let opened = guarded(|| {
            let builder = ParquetRecordBatchReaderBuilder::try_new(file).map_err(|error| error.to_string())?;
            check_columns(builder.metadata(), bytes)?;
            let (rows, content) = sizes(builder.metadata());
            let reader = builder.with_batch_size(at_once(rows, content)).build().map_err(|error| error.to_string())?;
            Ok((Box::new(reader.map(|batch| batch.map_err(|error| error.to_string()))) as Batches, rows))
        });
        let (batches, rows) = opened.map_err(|problem| damaged(path, &problem))?;
        Ok(Self::new(path, batches, bytes, Some(rows)))
    }

    /// Opens a stream of Arrow messages.
    pub fn arrow(path: &Path, mut file: File) -> Result<Self, DataError> {
        let bytes = size(path, &file)?;
        check_messages(&mut file, bytes).map_err(|problem| damaged(path, &problem))?;
        file.seek(SeekFrom::Start(0)).map_err(|cause| DataError::Read { path: path.to_owned(), cause })?;
        let opened = guarded(|| StreamReader::try_new(BufReader::new(file), None).map_err(|error| error.to_string()));
        let reader = opened.map_err(|problem| damaged(path, &problem))?;
        Ok(Self::new(path, Box::new(reader.map(|batch| batch.map_err(|error| error.to_string()))), bytes, None))
    }

    fn new(path: &Path, batches: Batches, file_bytes: u64, rows: Option<u64>) -> Self {
        Self { path: path.to_owned(), batches, batch: None, text: Vec::new(), next: 0, number: 0, file_bytes, rows }
    }

    /// Number of the row last returned, from 1.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// Bytes of the file that have been used, about.
    pub fn bytes(&self) -> u64 {
        let share = self.rows.map_or(0.0, |rows| self.number as f64 / rows.max(1) as f64);
        (self.file_bytes as f64 * share.min(1.0)) as u64
    }

    /// An error at the row last returned.
    pub fn error(&self, problem: impl Into<Problem>) -> DataError {
        // A column of a text that nobody has written helps nobody.
        let Problem { text, whole, .. } = problem.into();
        DataError::Line { path: self.path.clone(), unit: "row", line: self.number, column: None, problem: text, whole }
    }

    /// The next row as a JSON object, without members that are null; None behind the last.
    ///
    /// # Errors
    /// What is damaged in the file; a row that is too long.
    pub fn next_row(&mut self) -> Result<Option<&str>, DataError> {
        while self.next == self.text.len() {
            if !self.fill()? {
                return Ok(None);
            }
        }
        let start = self.next;
        let length = self.text[start..].iter().position(|&byte| byte == b'\n').unwrap_or(self.text.len() - start);
        self.next = (start + length + 1).min(self.text.len());
        self.number += 1;
        if length as u64 > MAX_LINE_BYTES {
            return Err(self.error(format!("longer than {MAX_LINE_BYTES} bytes")));
        }
        match std::str::from_utf8(&self.text[start..start + length]) {
            Ok(text) => Ok(Some(text)),
            Err(_) => Err(self.error("not UTF-8")),
        }
    }

    /// Makes JSON of the next few rows; false behind the last.
    fn fill(&mut self) -> Result<bool, DataError> {
        let Some((batch, at_once)) = self.batch.take() else {
            let batches = &mut self.batches;
            let next = guarded(|| batches.next().transpose());
            let Some(batch) = next.map_err(|problem| self.damaged(&problem))? else { return Ok(false) };
            let at_once = at_once(batch.num_rows() as u64, batch.get_array_memory_size() as u64);
            self.batch = Some((batch, at_once));
            return Ok(true);
        };
        let now = at_once.min(batch.num_rows());
        self.text.clear();
        self.next = 0;
        let text = &mut self.text;
        let written = guarded(|| {
            let mut writer = WriterBuilder::new().with_explicit_nulls(false).build::<_, LineDelimited>(text);
            writer.write(&batch.slice(0, now)).and_then(|()| writer.finish()).map_err(|error| error.to_string())
        });
        written.map_err(|problem| self.damaged(&problem))?;
        let left = batch.num_rows() - now;
        self.batch = (left > 0).then(|| (batch.slice(now, left), at_once));
        Ok(true)
    }

    fn damaged(&self, problem: &str) -> DataError {
        let problem = format!("the rows behind this one cannot be read: {problem}");
        self.error(Problem { whole: true, ..Problem::from(problem) })
    }
}

/// What the libraries say of a damaged file, some of it by an assertion.
fn guarded<T>(read: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(read)).unwrap_or_else(|_| Err("its parts contradict each other".to_owned()))
}

/// Rows that may be held at one time, where `rows` of them have `bytes`.
fn at_once(rows: u64, bytes: u64) -> usize {
    (BYTES_AT_ONCE / (bytes / rows.max(1)).max(1)).clamp(1, ROWS_AT_ONCE) as usize
}

/// Rows of a Parquet file, and their bytes when unpacked.
fn sizes(metadata: &ParquetMetaData) -> (u64, u64) {
    let groups = || metadata.row_groups().iter();
    let known = |count: i64| u64::try_from(count).unwrap_or(0);
    (groups().map(|group| known(group.num_rows())).sum(), groups().map(|group| known(group.total_byte_size())).sum())
}

/// The description at the end of a Parquet file is inside the file, and not larger than any is.
fn check_footer(file: &mut File, bytes: u64) -> Result<(), String> {
    let mut end = [0; 8];
    let read = file.seek(SeekFrom::End(-8)).and_then(|_| file.read_exact(&mut end));
    read.map_err(|error| error.to_string())?;
    let [a, b, c, d, ..] = end;
    let length = u64::from(u32::from_le_bytes([a, b, c, d]));
    match &end[4..] {
        b"PARE" => Err("it is encrypted".to_owned()),
        b"PAR1" if length + 12 <= bytes && length <= MAX_METADATA_BYTES => Ok(()),
        b"PAR1" => Err(format!("its description has {length} bytes")),
        _ => Err("its end is missing".to_owned()),
    }
}

/// The columns of a Parquet file lie inside the file.
fn check_columns(metadata: &ParquetMetaData, bytes: u64) -> Result<(), String> {
    for column in metadata.row_groups().iter().flat_map(|group| group.columns()) {
        let start = column.dictionary_page_offset().unwrap_or_else(|| column.data_page_offset());
        let end = start.checked_add(column.compressed_size());
        let inside = start >= 0 && column.compressed_size() >= 0 && end.is_some_and(|end| end.unsigned_abs() <= bytes);
        if !inside {
            return Err(format!("column {} lies beyond the end of the file", column.column_path()));
        }
    }
    Ok(())
}

/// The messages of an Arrow stream lie inside the file, and none is larger than what is read in one piece.
fn check_messages(file: &mut File, bytes: u64) -> Result<(), String> {
    let failed = |error: std::io::Error| error.to_string();
    let mut at = 0;
    while at < bytes {
        file.seek(SeekFrom::Start(at)).map_err(failed)?;
        let mut head = [0; 8];
        file.read_exact(&mut head).map_err(|_| format!("it ends amid a message, at byte {at}"))?;
        let [a, b, c, d, e, f, g, h] = head;
        if [a, b, c, d] != *ARROW_STREAM {
            return Err(format!("byte {at} begins no message"));
        }
        let length = u64::from(u32::from_le_bytes([e, f, g, h]));
        if length == 0 {
            return Ok(());
        }
        if length > MAX_METADATA_BYTES || at + 8 + length > bytes {
            return Err(format!("the message at byte {at} has a description of {length} bytes"));
        }
        let mut description = vec![0; length as usize];
        file.read_exact(&mut description).map_err(failed)?;
        let message = arrow_ipc::root_as_message(&description).map_err(|error| format!("the message at byte {at}: {error}"))?;
        let body = u64::try_from(message.bodyLength()).unwrap_or(u64::MAX);
        if body > MAX_BATCH_BYTES {
            return Err(format!(
                "the message at byte {at} has {body} bytes, more than {MAX_BATCH_BYTES}: save it with a smaller writer_batch_size"
            ));
        }
        at += 8 + length + body;
    }
    match at == bytes {
        true => Ok(()),
        false => Err("its last message is cut off".to_owned()),
    }
}

fn size(path: &Path, file: &File) -> Result<u64, DataError> {
    file.metadata().map(|metadata| metadata.len()).map_err(|cause| DataError::Read { path: path.to_owned(), cause })
}

fn damaged(path: &Path, problem: &str) -> DataError {
    DataError::Damaged { path: path.to_owned(), problem: problem.to_owned() }
}

#[cfg(test)]
mod tests;
