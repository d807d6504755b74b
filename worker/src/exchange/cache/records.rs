//! A file of records: written by one process, read by any.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use bytes::Bytes;

use super::record::{HEADER_BYTES, Header};
use super::{ALIGNMENT, CacheError, SampleKey, io_error};
use crate::exchange::states::SequenceStates;

/// What a record holds, and what of it is wanted.
#[derive(Clone, Debug)]
pub(super) struct Layout {
    /// Bytes of a token's row at each tap of a record.
    pub(super) row_bytes: Vec<usize>,
    /// Which taps are read, by their places in the record.
    pub(super) picks: Vec<usize>,
}

impl Layout {
    pub(super) fn record_bytes(&self, tokens: usize) -> u64 {
        (HEADER_BYTES as u64 + self.payload(tokens)).next_multiple_of(ALIGNMENT)
    }

    fn payload(&self, tokens: usize) -> u64 {
        tokens as u64 * self.row_bytes.iter().sum::<usize>() as u64
    }
}

/// A file of records.
#[derive(Debug)]
pub(super) struct RecordFile {
    pub(super) path: PathBuf,
    pub(super) file: File,
    pub(super) layout: Layout,
}

/// What a scan has found.
#[derive(Debug, Default)]
pub(super) struct Scan {
    /// Whole records with their offsets, in their order.
    pub(super) records: Vec<(u64, Header)>,
    /// End of the last whole record.
    pub(super) end: u64,
    /// Unreadable places before it.
    pub(super) damaged: u64,
}

impl RecordFile {
    /// Reads the headers of all records from `offset` to the end of the file, at `length`.
    pub(super) fn scan(&self, mut offset: u64, length: u64) -> io::Result<Scan> {
        let mut scan = Scan { end: offset, ..Scan::default() };
        let (mut unreadable, mut bytes) = (0, [0; HEADER_BYTES]);
        while offset + HEADER_BYTES as u64 <= length {
            self.file.read_exact_at(&mut bytes, offset)?;
            let header = Header::decode(&bytes).filter(|header| {
                let tokens = header.tokens as usize;
                header.payload == self.layout.payload(tokens) && offset + self.layout.record_bytes(tokens) <= length
            });
            match header {
                Some(header) => {
                    scan.records.push((offset, header));
                    offset += self.layout.record_bytes(header.tokens as usize);
                    scan.end = offset;
                    scan.damaged += std::mem::take(&mut unreadable);
                }
                None => {
                    unreadable += 1;
                    offset += ALIGNMENT;
                }
            }
        }
        // What follows the last record is no damage: a crash left it of a write, or one is being written.
        Ok(scan)
    }

    /// The wanted rows of a record.
    pub(super) fn read(&self, offset: u64, header: &Header) -> Result<Vec<Bytes>, CacheError> {
        let tokens = header.tokens as usize;
        let damaged = || CacheError::Damaged { path: self.path.clone(), offset, tokens };
        let mut payload = vec![0; header.payload as usize];
        match self.file.read_exact_at(&mut payload, offset + HEADER_BYTES as u64) {
            // Its writer has given the room back.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Err(damaged()),
            outcome => outcome.map_err(io_error("read", &self.path))?,
        }
        if !header.fits(&payload) {
            return Err(damaged());
        }
        let payload = Bytes::from(payload);
        let begin = |tap: usize| tokens * self.layout.row_bytes[..tap].iter().sum::<usize>();
        Ok(self.layout.picks.iter().map(|&tap| payload.slice(begin(tap)..begin(tap + 1))).collect())
    }

    /// Writes a record at `offset`, behind the last one.
    pub(super) fn write(&self, sample: SampleKey, states: &SequenceStates, offset: u64) -> Result<Header, CacheError> {
        let header = Header::new(sample, states);
        let io = io_error("write", &self.path);
        let mut position = offset + HEADER_BYTES as u64;
        let rows = states.taps.iter().try_for_each(|tap| {
            let at = position;
            position += tap.len() as u64;
            self.file.write_all_at(tap, at)
        });
        // The header comes behind the rows, and the record's full length last: who reads while this is written sees all of it or none.
        rows.and_then(|()| self.file.write_all_at(&header.encode(), offset)).map_err(&io)?;
        let end = offset + self.layout.record_bytes(states.tokens);
        let length = self.file.metadata().map_err(&io)?.len().max(end);
        self.file.set_len(length).map_err(&io)?;
        Ok(header)
    }
}

/// Opens a file that another process may write.
pub(super) fn open(path: &Path, layout: &Layout) -> io::Result<RecordFile> {
    Ok(RecordFile { path: path.to_owned(), file: File::open(path)?, layout: layout.clone() })
}
