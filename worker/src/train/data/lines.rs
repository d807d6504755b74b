//! Reads a JSONL file line by line with bounds, so that a wrong file is named instead of filling the memory.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use sha2::{Digest as _, Sha256};

use super::problem::{ARRAY, CARRIAGE_RETURN, Problem};
use crate::train::error::{DataError, TrainError};
use crate::train::stop::Stop;

/// Largest file a trainer reads, bytes.
pub const MAX_FILE_BYTES: u64 = 8 << 30;
/// Longest line, bytes.
pub const MAX_LINE_BYTES: u64 = 16 << 20;

/// What files begin with that are no text in UTF-8.
const OTHERS: &[(&[u8], &str)] = &[
    (b"\xff\xfe", "text in UTF-16: save it as UTF-8"),
    (b"\xfe\xff", "text in UTF-16: save it as UTF-8"),
    (b"\x1f\x8b", "compressed by gzip: unpack it"),
    (b"\x28\xb5\x2f\xfd", "compressed by Zstandard: unpack it"),
    (b"PK\x03\x04", "a ZIP archive: unpack it"),
    (b"ARROW1", "an Arrow file: write it as Parquet"),
];

/// The lines of one file; empty lines are passed over but counted.
pub struct Lines {
    path: PathBuf,
    reader: BufReader<File>,
    buffer: Vec<u8>,
    number: u64,
    bytes: u64,
}

impl Lines {
    /// Opens `path`; a missing or too large file is an error by name.
    pub fn open(path: &Path) -> Result<Self, DataError> {
        let file = open(path)?;
        Ok(Self { path: path.to_owned(), reader: BufReader::with_capacity(1 << 18, file), buffer: Vec::new(), number: 0, bytes: 0 })
    }

    /// Number of the line last returned, from 1.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// Bytes read so far.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// An error at the line last returned.
    pub fn error(&self, problem: impl Into<Problem>) -> DataError {
        let Problem { column, text, whole } = problem.into();
        DataError::Line { path: self.path.clone(), unit: "line", line: self.number, column, problem: text, whole }
    }

    /// The next line that is not blank, without its line end; None at the end of the file.
    pub fn next_line(&mut self) -> Result<Option<&str>, DataError> {
        loop {
            self.buffer.clear();
            self.number += 1;
            let read = (&mut self.reader).take(MAX_LINE_BYTES + 1).read_until(b'\n', &mut self.buffer);
            let read = read.map_err(|cause| DataError::Read { path: self.path.clone(), cause })? as u64;
            self.bytes += read;
            if read == 0 {
                return Ok(None);
            }
            let other = OTHERS.iter().find(|(start, _)| self.number == 1 && self.buffer.starts_with(start));
            if let Some((_, what)) = other {
                return Err(self.error(Problem { whole: true, ..Problem::from(format!("not JSON Lines but {what}")) }));
            }
            if read > MAX_LINE_BYTES {
                let error = self.error(self.too_long());
                self.pass_over()?;
                return Err(error);
            }
            // A byte-order mark is what some editors put first; JSON forbids it, people do not see it.
            if self.number == 1 && self.buffer.starts_with(b"\xef\xbb\xbf") {
                self.buffer.drain(..3);
            }
            if !self.buffer.trim_ascii().is_empty() {
                break;
            }
        }
        match std::str::from_utf8(&self.buffer) {
            Ok(text) => Ok(Some(text.trim_end())),
            Err(error) => Err(self.error(format!("not UTF-8 at byte {} of the line", error.valid_up_to()))),
        }
    }

    /// Leaves the rest of a line that is too long.
    fn pass_over(&mut self) -> Result<(), DataError> {
        while self.buffer.last() != Some(&b'\n') {
            self.buffer.clear();
            let read = (&mut self.reader).take(MAX_LINE_BYTES).read_until(b'\n', &mut self.buffer);
            let read = read.map_err(|cause| DataError::Read { path: self.path.clone(), cause })?;
            self.bytes += read as u64;
            if read == 0 {
                break;
            }
        }
        Ok(())
    }

    /// Why a line may be so long.
    fn too_long(&self) -> String {
        let start = self.buffer.trim_ascii_start();
        match () {
            () if start.starts_with(b"[") => ARRAY.to_owned(),
            () if start.contains(&b'\r') => CARRIAGE_RETURN.to_owned(),
            () => format!("longer than {MAX_LINE_BYTES} bytes"),
        }
    }
}

/// `sha256:<hex>` of a data file, unless someone asks to stop.
pub fn file_digest(path: &Path, stop: &Stop) -> Result<String, TrainError> {
    let mut file = open(path)?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 18];
    loop {
        stop.check()?;
        match file.read(&mut buffer) {
            Ok(0) => return Ok(carryon_crds::wire::digest_of(hasher)),
            Ok(count) => hasher.update(&buffer[..count]),
            Err(cause) => return Err(DataError::Read { path: path.to_owned(), cause }.into()),
        }
    }
}

/// Opens a data file; a missing or too large one is an error by name.
pub fn open(path: &Path) -> Result<File, DataError> {
    let read = |cause| DataError::Read { path: path.to_owned(), cause };
    let file = File::open(path).map_err(|cause| match cause.kind() {
        std::io::ErrorKind::NotFound => DataError::Missing { path: path.to_owned() },
        _ => read(cause),
    })?;
    let metadata = file.metadata().map_err(read)?;
    if metadata.is_dir() {
        return Err(DataError::Folder { path: path.to_owned() });
    }
    let bytes = metadata.len();
    if bytes > MAX_FILE_BYTES {
        return Err(DataError::TooLarge { path: path.to_owned(), bytes, limit: MAX_FILE_BYTES });
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(content: &[u8]) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), content).unwrap();
        file
    }

    #[test]
    fn counts_blank_lines_but_does_not_return_them() {
        let file = file(b"\xef\xbb\xbf\r\none\r\n\n  \ntwo");
        let mut lines = Lines::open(file.path()).unwrap();
        assert_eq!(lines.next_line().unwrap(), Some("one"));
        assert_eq!(lines.next_line().unwrap(), Some("two"));
        assert_eq!(lines.number(), 5);
        assert_eq!(lines.next_line().unwrap(), None);
    }

    #[test]
    fn names_line_and_byte_of_broken_utf8() {
        let file = file(b"fine\nab\xff\n");
        let mut lines = Lines::open(file.path()).unwrap();
        lines.next_line().unwrap();
        let error = lines.next_line().unwrap_err().to_string();
        assert!(error.ends_with("line 2: not UTF-8 at byte 2 of the line"), "{error}");
    }

    #[test]
    fn refuses_a_line_beyond_the_bound() {
        let file = file(&[&vec![b'x'; 2 * MAX_LINE_BYTES as usize + 1][..], b"\nnext"].concat());
        let mut lines = Lines::open(file.path()).unwrap();
        let error = lines.next_line().unwrap_err().to_string();
        assert!(error.contains("line 1: longer than 16777216 bytes"), "{error}");
        assert_eq!(lines.next_line().unwrap(), Some("next"));
        assert_eq!(lines.number(), 2);
    }

    #[test]
    fn says_what_a_file_is_that_is_no_text() {
        for (content, what) in [
            (&b"\xff\xfe{\0}\0"[..], "line 1: not JSON Lines but text in UTF-16: save it as UTF-8"),
            (b"\x1f\x8b\x08\0\0", "line 1: not JSON Lines but compressed by gzip: unpack it"),
            (b"ARROW1\0\0", "line 1: not JSON Lines but an Arrow file: write it as Parquet"),
        ] {
            let error = Lines::open(file(content).path()).unwrap().next_line().unwrap_err().to_string();
            assert!(error.ends_with(what), "{error}");
        }
    }

    #[test]
    fn a_long_line_may_be_another_kind_of_file() {
        for (begin, what) in [("[", ARRAY), ("{}\r", CARRIAGE_RETURN)] {
            let content = begin.to_owned() + &"x".repeat(MAX_LINE_BYTES as usize);
            let error = Lines::open(file(content.as_bytes()).path()).unwrap().next_line().unwrap_err().to_string();
            assert!(error.ends_with(what), "{error}");
        }
    }

    #[test]
    fn names_a_missing_file() {
        let error = Lines::open(Path::new("/nowhere/train.jsonl")).err().unwrap();
        assert_eq!(error.to_string(), "data file \"/nowhere/train.jsonl\" does not exist");
    }
}
