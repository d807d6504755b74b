//! A file that is not whole yet, `NAME.part`, and the record beside it of how much is durable: a kill at any byte costs at most one chunk.

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read as _, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};

use carryon_crds::wire::hex;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::error::FetchError;
use super::folder::{PART, RECORD};
use super::plan::RemoteFile;
use crate::files;

/// Bytes after which what was written is made durable.
pub const CHUNK: u64 = 8 << 20;
/// Bytes that are read at once.
const BLOCK: usize = 1 << 20;

/// Content of the record.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Record {
    /// Of the file at its source when this was written.
    etag: Option<String>,
    /// Bytes of the whole file.
    size: u64,
    /// Bytes from the beginning that are durable.
    synced: u64,
}

/// An open part.
pub struct Part {
    /// Where the whole file goes.
    target: PathBuf,
    file: File,
    record: Record,
    length: u64,
    hasher: Sha256,
}

fn beside(target: &Path, end: &str) -> PathBuf {
    let mut name = target.as_os_str().to_owned();
    name.push(end);
    name.into()
}

/// Where the part of `target` is.
pub fn path(target: &Path) -> PathBuf {
    beside(target, PART)
}

impl Part {
    /// Opens the part of `target`, with what is durable of `remote`. One of another version of the file is thrown away.
    ///
    /// # Errors
    /// It cannot be made, read or cut.
    pub fn open(target: PathBuf, remote: &RemoteFile) -> Result<Self, FetchError> {
        let (part, record_path) = (path(&target), beside(&target, RECORD));
        let found: Option<Record> = fs::read(&record_path).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok());
        // What has no mark may have changed between two starts.
        let same = |record: &Record| record.size == remote.size && record.etag == remote.etag && record.etag.is_some();
        let synced = found.as_ref().filter(|record| same(record)).map_or(0, |record| record.synced.min(remote.size));
        if found.is_some_and(|record| !same(&record)) {
            tracing::warn!("{} has changed at its source: what was fetched of it is thrown away", remote.name);
        }
        if let Some(folder) = target.parent() {
            fs::create_dir_all(folder).map_err(FetchError::file("create", folder))?;
        }
        let opened = OpenOptions::new().create(true).truncate(false).read(true).write(true).open(&part);
        let mut file = opened.map_err(FetchError::file("open", &part))?;
        let held = file.metadata().map_err(FetchError::file("inspect", &part))?.len();
        let length = if held < synced { 0 } else { synced };
        file.set_len(length).map_err(FetchError::file("cut", &part))?;
        let hasher = digest(&mut file, length).map_err(FetchError::file("read", &part))?;
        file.seek(SeekFrom::Start(length)).map_err(FetchError::file("read", &part))?;
        let record = Record { etag: remote.etag.clone(), size: remote.size, synced: length };
        Ok(Self { target, file, record, length, hasher })
    }

    /// Bytes that are there.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// Appends `bytes`; whenever a chunk is whole it is made durable, and that is recorded.
    ///
    /// # Errors
    /// The volume takes no more; more bytes than the file has.
    pub fn write(&mut self, mut bytes: &[u8]) -> Result<(), FetchError> {
        if bytes.len() as u64 > self.record.size - self.length {
            let (what, size) = (self.target.display().to_string(), self.record.size);
            return Err(FetchError::unreachable(what, format!("its source sends more than its {size} bytes")));
        }
        while !bytes.is_empty() {
            let room = CHUNK - self.length % CHUNK;
            let (now, later) = bytes.split_at(bytes.len().min(usize::try_from(room).unwrap_or(usize::MAX)));
            self.file.write_all(now).map_err(FetchError::file("write", path(&self.target)))?;
            self.hasher.update(now);
            self.length += now.len() as u64;
            if self.length.is_multiple_of(CHUNK) {
                self.sync()?;
            }
            bytes = later;
        }
        Ok(())
    }

    /// Makes durable what is there.
    ///
    /// # Errors
    /// The volume says so.
    pub fn sync(&mut self) -> Result<(), FetchError> {
        self.file.sync_data().map_err(FetchError::file("write", path(&self.target)))?;
        self.record.synced = self.length;
        let (place, bytes) = (beside(&self.target, RECORD), serde_json::to_vec(&self.record).expect("a record is plain data"));
        files::write_atomic(&place, &bytes).map_err(FetchError::file("write", place))
    }

    /// Throws all of it away.
    ///
    /// # Errors
    /// The volume says so.
    pub fn clear(&mut self) -> Result<(), FetchError> {
        self.file.set_len(0).and_then(|()| self.file.rewind()).map_err(FetchError::file("cut", path(&self.target)))?;
        (self.length, self.hasher) = (0, Sha256::new());
        self.sync()
    }

    /// Digest of what is there, hexadecimal.
    pub fn sha256(&self) -> String {
        hex(&self.hasher.clone().finalize())
    }

    /// Gives the file its name.
    ///
    /// # Errors
    /// The volume says so.
    pub fn finish(self) -> Result<(), FetchError> {
        self.file.sync_all().map_err(FetchError::file("write", path(&self.target)))?;
        rename(&self.target)
    }
}

/// Gives a whole and durable part its name, and removes its record.
///
/// # Errors
/// The volume says so.
pub fn rename(target: &Path) -> Result<(), FetchError> {
    let folder = target.parent().unwrap_or(Path::new("."));
    let renamed = fs::rename(path(target), target).and_then(|()| File::open(folder)?.sync_all());
    renamed.map_err(FetchError::file("rename", path(target)))?;
    let record = beside(target, RECORD);
    match fs::remove_file(&record) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(FetchError::file("remove", record)(error)),
        _ => Ok(()),
    }
}

/// Digest of the file at `path`, hexadecimal.
///
/// # Errors
/// It cannot be read.
pub fn sha256(path: &Path) -> Result<String, FetchError> {
    let digest = File::open(path).and_then(|mut file| digest(&mut file, u64::MAX)).map_err(FetchError::file("read", path))?;
    Ok(hex(&digest.finalize()))
}

/// Reads up to `length` bytes.
fn digest(file: &mut File, length: u64) -> std::io::Result<Sha256> {
    let (mut hasher, mut block, mut limited) = (Sha256::new(), vec![0; BLOCK], file.take(length));
    loop {
        match limited.read(&mut block)? {
            0 => return Ok(hasher),
            count => hasher.update(&block[..count]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn remote(size: u64, etag: &str) -> RemoteFile {
        RemoteFile { name: "a".to_owned(), size, etag: Some(etag.to_owned()), sha256: None }
    }

    #[test]
    fn a_part_goes_on_after_its_last_whole_chunk_and_ends_with_the_digest_of_all() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("sub/a");
        let content: Vec<u8> = (0..2 * CHUNK + 5).map(|at| (at % 251) as u8).collect();
        let remote = remote(content.len() as u64, "e");
        let mut part = Part::open(target.clone(), &remote).unwrap();
        part.write(&content[..CHUNK as usize + 3]).unwrap();
        drop(part);
        let mut part = Part::open(target.clone(), &remote).unwrap();
        assert_eq!(part.length(), CHUNK);
        part.write(&content[CHUNK as usize..]).unwrap();
        assert!(part.write(b"x").is_err());
        assert_eq!(part.sha256(), hex(&Sha256::digest(&content)));
        part.finish().unwrap();
        assert_eq!(fs::read(&target).unwrap(), content);
        assert_eq!(sha256(&target).unwrap(), hex(&Sha256::digest(&content)));
        assert_eq!(fs::read_dir(folder.path().join("sub")).unwrap().count(), 1);
    }

    #[test]
    fn a_part_of_another_version_or_shorter_than_its_record_is_thrown_away() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("a");
        let mut part = Part::open(target.clone(), &remote(10, "e")).unwrap();
        part.write(b"12345").unwrap();
        part.sync().unwrap();
        assert_eq!(Part::open(target.clone(), &remote(10, "e")).unwrap().length(), 5);
        assert_eq!(Part::open(target.clone(), &remote(10, "f")).unwrap().length(), 0);
        assert_eq!(Part::open(target, &remote(10, "e")).unwrap().length(), 0);
    }
}
