//! Hidden states on disk: those of a frozen model never change, so each sequence is asked for once.
//!
//! One folder per [`CacheKey`], in it one growing file of records, each at a multiple of [`ALIGNMENT`]: a header with its
//! own checksum, then the rows of all taps with theirs. The index lives in memory and is rebuilt from the headers.
//! **Invariant** a record is indexed only after its bytes are synced, so what a step reads from the cache survives any
//! crash; what a crash left half-written lies behind the last whole record and is cut off when the cache is opened.

mod error;
mod record;

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use carryon_crds::common::Taps;
use carryon_crds::wire::{Identity, ModelDescription, Numerics};
use sha2::{Digest as _, Sha256};

pub use error::CacheError;

use super::states::SequenceStates;
use super::wire::tap_names;
use crate::numbers::number_bytes;
use record::{HEADER_BYTES, Header};

/// Records begin at multiples of this, so that a damaged header costs one record and not those behind it.
pub const ALIGNMENT: u64 = 4096;

const STATES_FILE: &str = "states.bin";
const KEY_FILE: &str = "key.json";

/// What the states of a cache depend on, beside the tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CacheKey {
    /// The base.
    pub identity: Identity,
    /// How it computes.
    pub numerics: Numerics,
    /// Where the states are read.
    pub taps: Taps,
    /// Width D of a row.
    pub hidden_size: usize,
}

impl CacheKey {
    /// The key of `taps` in the model of a pool.
    pub fn new(description: &ModelDescription, taps: &Taps) -> Self {
        let (identity, numerics) = (description.identity.clone(), description.numerics.clone());
        Self { identity, numerics, taps: taps.clone(), hidden_size: description.hidden_size as usize }
    }

    fn text(&self) -> String {
        let (numerics, taps) = (self.numerics.key(), tap_names(&self.taps));
        serde_json::json!({"identity": self.identity, "numerics": numerics, "taps": taps, "hiddenSize": self.hidden_size}).to_string()
    }

    fn record_bytes(&self, tokens: usize) -> u64 {
        let payload = (tokens * self.taps.count() * self.hidden_size * number_bytes(self.numerics.dtype)) as u64;
        (HEADER_BYTES as u64 + payload).next_multiple_of(ALIGNMENT)
    }

    /// Bytes on disk for sequences of these lengths in tokens.
    pub fn estimate(&self, lengths: impl IntoIterator<Item = usize>) -> u64 {
        lengths.into_iter().map(|tokens| self.record_bytes(tokens)).sum()
    }
}

/// Names a sequence in a cache: the digest of its token ids.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SampleKey([u8; 32]);

impl SampleKey {
    /// The key of a sequence.
    pub fn of(tokens: &[u32]) -> Self {
        let mut hasher = Sha256::new();
        tokens.iter().for_each(|token| hasher.update(token.to_le_bytes()));
        Self(hasher.finalize().into())
    }
}

/// Place of a record's payload.
#[derive(Clone, Copy, Debug)]
struct Place {
    offset: u64,
    header: Header,
}

/// An open cache; shared between threads by reference.
#[derive(Debug)]
pub struct StateCache {
    path: PathBuf,
    file: File,
    key: CacheKey,
    index: Mutex<HashMap<SampleKey, Place>>,
    /// Held while writing.
    room: Mutex<Room>,
    damaged: AtomicU64,
}

/// What the file takes, and what it may take.
#[derive(Debug)]
struct Room {
    /// End of the last record.
    end: u64,
    quota: u64,
}

impl StateCache {
    /// Opens or creates the cache of `key` under `folder`; caches of other keys there that no process holds are removed:
    /// their states are of another base, taps or kernel. `quota` bounds the file's bytes: records beyond it are dropped.
    pub fn open(folder: &Path, key: CacheKey, quota: u64) -> Result<Self, CacheError> {
        let name = carryon_crds::wire::digest(key.text().as_bytes()).replace("sha256:", "states-")[..23].to_owned();
        let own = folder.join(name);
        fs::create_dir_all(&own).map_err(io_error("create", &own))?;
        remove_others(folder, &own);
        let key_file = own.join(KEY_FILE);
        if !key_file.exists() {
            crate::files::write_atomic(&key_file, key.text().as_bytes()).map_err(io_error("write", &key_file))?;
        }
        let path = own.join(STATES_FILE);
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path).map_err(io_error("open", &path))?;
        lock(&file, &path)?;
        let length = file.metadata().map_err(io_error("inspect", &path))?.len();
        let (mut index, mut end, damaged) = rebuild(&file, length, &key).map_err(io_error("read", &path))?;
        if end > quota {
            let end_of = |place: &Place| place.offset + key.record_bytes(place.header.tokens as usize);
            index.retain(|_, place| end_of(place) <= quota);
            end = index.values().map(end_of).max().unwrap_or(0);
        }
        file.set_len(end).map_err(io_error("cut", &path))?;
        if damaged > 0 {
            tracing::warn!("cache {path:?}: skipped {damaged} damaged places of {ALIGNMENT} bytes");
        }
        let (index, room, damaged) = (Mutex::new(index), Mutex::new(Room { end, quota }), AtomicU64::new(damaged));
        Ok(Self { path, file, key, index, room, damaged })
    }

    /// Whether states of this sequence are held.
    pub fn contains(&self, sample: &SampleKey) -> bool {
        self.index.lock().unwrap_or_else(PoisonError::into_inner).contains_key(sample)
    }

    /// Sequences held.
    pub fn len(&self) -> usize {
        self.index.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// Whether no sequence is held.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes on disk.
    pub fn bytes(&self) -> u64 {
        self.room().end
    }

    /// Records found damaged since the cache was opened, and places skipped at opening.
    pub fn damaged(&self) -> u64 {
        self.damaged.load(Ordering::Relaxed)
    }

    /// Adds one sequence; on return it is durable.
    pub fn put(&self, sample: &SampleKey, states: &SequenceStates) -> Result<(), CacheError> {
        self.put_all(&[(*sample, states)])
    }

    /// Adds sequences with one sync; on return they are durable. Those that fit before the quota are kept even if one does not. When the file
    /// system refuses one, the cache grows no more: what is left of the disk is for files that matter.
    pub fn put_all(&self, records: &[(SampleKey, &SequenceStates)]) -> Result<(), CacheError> {
        let mut room = self.room();
        let mut position = room.end;
        let mut places = Vec::with_capacity(records.len());
        let mut outcome = Ok(());
        for (sample, states) in records {
            match self.write(*sample, states, position, room.quota) {
                Ok(header) => places.push((*sample, Place { offset: position, header })),
                Err(error) => {
                    outcome = Err(error);
                    break;
                }
            }
            position += self.key.record_bytes(states.tokens);
        }
        if let Err(error) = self.file.sync_data() {
            outcome = Err(io_error("sync", &self.path)(error));
            places.clear();
            position = room.end;
        }
        if matches!(outcome, Err(CacheError::Io { .. })) {
            room.quota = position;
            // Best effort: what stays of a record lies behind the last whole one and is cut off at the next start.
            let _ = self.file.set_len(position);
        }
        room.end = position;
        self.index.lock().unwrap_or_else(PoisonError::into_inner).extend(places);
        outcome
    }

    /// Gives all of its room back and takes none any more; false when it has none.
    pub fn give_way(&self) -> bool {
        let mut room = self.room();
        room.quota = 0;
        if room.end == 0 {
            return false;
        }
        self.index.lock().unwrap_or_else(PoisonError::into_inner).clear();
        match self.file.set_len(0) {
            Ok(()) => {
                tracing::warn!("cache {:?} has given its {} bytes back: what must be written found no room", self.path, room.end);
                room.end = 0;
                true
            }
            Err(error) => {
                tracing::warn!("failed to empty cache {:?}: {error}", self.path);
                false
            }
        }
    }

    fn room(&self) -> MutexGuard<'_, Room> {
        self.room.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self, sample: SampleKey, states: &SequenceStates, offset: u64, quota: u64) -> Result<Header, CacheError> {
        let expected = states.tokens * self.key.hidden_size * number_bytes(self.key.numerics.dtype);
        let fits = states.dtype == self.key.numerics.dtype && states.taps.len() == self.key.taps.count();
        if !fits || states.taps.iter().any(|tap| tap.len() != expected) {
            return Err(CacheError::Shape { expected: expected * self.key.taps.count(), found: states.bytes() });
        }
        let needed = offset + self.key.record_bytes(states.tokens);
        if needed > quota {
            return Err(CacheError::Full { path: self.path.clone(), needed, quota });
        }
        let header = Header::new(sample, states);
        let io = io_error("write", &self.path);
        let mut position = offset + HEADER_BYTES as u64;
        let rows = states.taps.iter().try_for_each(|tap| {
            let at = position;
            position += tap.len() as u64;
            self.file.write_all_at(tap, at)
        });
        // The header comes last and the file is as long as its records, or a later scan could run beyond its end.
        rows.and_then(|()| self.file.write_all_at(&header.encode(), offset)).map_err(&io)?;
        let length = self.file.metadata().map_err(&io)?.len().max(needed);
        self.file.set_len(length).map_err(&io)?;
        Ok(header)
    }

    /// States of a sequence, `index` 0. [`CacheError::Damaged`] once for a damaged record, which is missing from then on.
    pub fn get(&self, sample: &SampleKey) -> Result<Option<SequenceStates>, CacheError> {
        let place = self.index.lock().unwrap_or_else(PoisonError::into_inner).get(sample).copied();
        let Some(Place { offset, header }) = place else { return Ok(None) };
        let mut payload = vec![0; header.payload as usize];
        self.file.read_exact_at(&mut payload, offset + HEADER_BYTES as u64).map_err(io_error("read", &self.path))?;
        let tokens = header.tokens as usize;
        if !header.fits(&payload) {
            self.index.lock().unwrap_or_else(PoisonError::into_inner).remove(sample);
            self.damaged.fetch_add(1, Ordering::Relaxed);
            return Err(CacheError::Damaged { path: self.path.clone(), offset, tokens });
        }
        let payload = Bytes::from(payload);
        let rows = payload.len() / self.key.taps.count();
        let taps = (0..self.key.taps.count()).map(|tap| payload.slice(tap * rows..(tap + 1) * rows)).collect();
        Ok(Some(SequenceStates { index: 0, tokens, dtype: self.key.numerics.dtype, taps }))
    }
}

fn io_error<'a>(action: &'static str, path: &'a Path) -> impl Fn(io::Error) -> CacheError + 'a {
    move |source| CacheError::Io { action, path: path.to_owned(), source }
}

/// A volume without file locks has the trainer's lease, which guards the cache too.
fn lock(file: &File, path: &Path) -> Result<(), CacheError> {
    match file.try_lock() {
        Err(fs::TryLockError::WouldBlock) => Err(CacheError::InUse(path.to_owned())),
        Ok(()) | Err(fs::TryLockError::Error(_)) => Ok(()),
    }
}

/// Reads the headers of all records: index, end of the last record, unreadable places before it. A later record of the same sequence replaces an earlier one.
fn rebuild(file: &File, length: u64, key: &CacheKey) -> io::Result<(HashMap<SampleKey, Place>, u64, u64)> {
    let (mut index, mut offset, mut end) = (HashMap::new(), 0, 0);
    let (mut damaged, mut unreadable) = (0, 0);
    let mut bytes = [0; HEADER_BYTES];
    while offset + HEADER_BYTES as u64 <= length {
        file.read_exact_at(&mut bytes, offset)?;
        let header = Header::decode(&bytes).filter(|header| {
            let record = key.record_bytes(header.tokens as usize);
            header.payload <= record && offset + record <= length
        });
        match header {
            Some(header) => {
                index.insert(header.sample, Place { offset, header });
                offset += key.record_bytes(header.tokens as usize);
                end = offset;
                damaged += std::mem::take(&mut unreadable);
            }
            None => {
                unreadable += 1;
                offset += ALIGNMENT;
            }
        }
    }
    // What follows the last record is no damage: a crash left it of a write.
    Ok((index, end, damaged))
}

/// Removes sibling caches that nobody holds; failing to is no reason to stop.
fn remove_others(folder: &Path, own: &Path) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    for other in entries.flatten().map(|entry| entry.path()).filter(|path| path != own && path.join(KEY_FILE).is_file()) {
        let free = File::open(other.join(STATES_FILE)).map_or(true, |file| file.try_lock().is_ok());
        if free && fs::remove_dir_all(&other).is_ok() {
            tracing::info!("removed cache {other:?}: its states are of another base, taps or kernel");
        }
    }
}

#[cfg(test)]
mod tests;
