//! Hidden states on disk: those of a frozen model never change, so each sequence is asked for once.
//!
//! One folder per [`CacheKey`], in it growing files of records, each at a multiple of [`ALIGNMENT`]: a header with its
//! own checksum, then the rows of all taps with theirs. The index lives in memory and is rebuilt from the headers.
//! A cache of one process has one file, `states.bin`; one that is shared has a file of each process ([`shared`]).
//! **Invariant** a record of ours is indexed only after its bytes are synced, so what a step reads from the cache survives any
//! crash; what a crash left half-written lies behind the last whole record and is cut off when the cache is opened. A record of
//! another process may be lost with its machine; it is asked for again, and is the same again.

mod error;
mod key;
mod record;
mod records;
pub mod shared;

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

pub use error::CacheError;
pub use key::{CacheKey, SampleKey};

use bytes::Bytes;

use super::states::SequenceStates;
use record::Header;
use records::RecordFile;
use shared::{Claim, Shared, Turn};

/// Records begin at multiples of this, so that a damaged header costs one record and not those behind it.
pub const ALIGNMENT: u64 = 4096;

const STATES_FILE: &str = "states.bin";
const KEY_FILE: &str = "key.json";

/// Place of a record's payload.
#[derive(Clone, Debug)]
struct Place {
    file: Arc<RecordFile>,
    offset: u64,
    header: Header,
}

/// Where each sequence lies; in several places when it came to be asked for more than once.
type Index = HashMap<SampleKey, Vec<Place>>;

/// An open cache; shared between threads by reference.
#[derive(Debug)]
pub struct StateCache {
    path: PathBuf,
    own: Arc<RecordFile>,
    key: CacheKey,
    index: Mutex<Index>,
    /// Held while writing.
    room: Mutex<Room>,
    damaged: AtomicU64,
    others: Option<Shared>,
}

/// What our file takes, and what it may take.
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
        let own = create(folder, &key)?;
        remove_others(folder, &own);
        let path = own.join(STATES_FILE);
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path).map_err(io_error("open", &path))?;
        lock(&file, &path)?;
        let length = file.metadata().map_err(io_error("inspect", &path))?.len();
        let file = Arc::new(RecordFile { path: path.clone(), file, layout: key.layout() });
        let mut scan = file.scan(0, length).map_err(io_error("read", &path))?;
        if scan.end > quota {
            let end_of = |(offset, header): &(u64, Header)| offset + file.layout.record_bytes(header.tokens as usize);
            scan.records.retain(|record| end_of(record) <= quota);
            scan.end = scan.records.last().map_or(0, end_of);
        }
        file.file.set_len(scan.end).map_err(io_error("cut", &path))?;
        if scan.damaged > 0 {
            tracing::warn!("cache {path:?}: skipped {} damaged places of {ALIGNMENT} bytes", scan.damaged);
        }
        let mut index = Index::new();
        scan.records.into_iter().for_each(|(offset, header)| add(&mut index, Place { file: file.clone(), offset, header }));
        let (index, room, damaged) = (Mutex::new(index), Mutex::new(Room { end: scan.end, quota }), AtomicU64::new(scan.damaged));
        Ok(Self { path, own: file, key, index, room, damaged, others: None })
    }

    /// Opens or creates the cache of `key` under `folder`, which other processes may use at the same time: each reads what the others have written,
    /// also under keys with more taps. `quota` bounds what this process adds. Nothing is ever removed.
    pub fn open_shared(folder: &Path, key: CacheKey, quota: u64) -> Result<Self, CacheError> {
        let own = create(folder, &key)?;
        let (others, path, file) = Shared::begin(folder, &own).map_err(io_error("begin a file in", &own))?;
        let own = Arc::new(RecordFile { path: path.clone(), file, layout: key.layout() });
        let (index, room, damaged) = (Mutex::default(), Mutex::new(Room { end: 0, quota }), AtomicU64::new(0));
        let cache = Self { path, own, key, index, room, damaged, others: Some(others) };
        cache.refresh();
        Ok(cache)
    }

    /// Takes note of what other processes have written since.
    fn refresh(&self) {
        let Some(others) = &self.others else { return };
        let news = others.news(&self.key);
        let mut index = self.index();
        news.into_iter().for_each(|(file, offset, header)| add(&mut index, Place { file, offset, header }));
    }

    fn index(&self) -> MutexGuard<'_, Index> {
        self.index.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// States of a sequence, or whose turn it is to ask for them, somebody else having been waited for as long as `waited`. A damaged record is
    /// named and as if it were not there.
    pub fn get_or_claim(&self, sample: &SampleKey, waited: Duration) -> Result<SequenceStates, Turn> {
        let get = || {
            self.get(sample).unwrap_or_else(|error| {
                tracing::warn!("{error}; asking the pool again");
                None
            })
        };
        if let Some(states) = get() {
            return Ok(states);
        }
        let Some(others) = &self.others else { return Err(Turn::Ours(Claim::default())) };
        let turn = others.claim(sample, waited);
        // What was written until just now: who gave a claim up has written before.
        self.refresh();
        get().ok_or(turn)
    }

    /// What is held.
    pub fn key(&self) -> &CacheKey {
        &self.key
    }

    /// Whether states of this sequence are held.
    pub fn contains(&self, sample: &SampleKey) -> bool {
        self.index().contains_key(sample)
    }

    /// Sequences held.
    pub fn len(&self) -> usize {
        self.index().len()
    }

    /// Whether no sequence is held.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes on disk, those of others that are read included.
    pub fn bytes(&self) -> u64 {
        self.room().end + self.others.as_ref().map_or(0, Shared::bytes)
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
                Ok(header) => places.push(Place { file: self.own.clone(), offset: position, header }),
                Err(error) => {
                    outcome = Err(error);
                    break;
                }
            }
            position += self.own.layout.record_bytes(states.tokens);
        }
        if let Err(error) = self.own.file.sync_data() {
            outcome = Err(io_error("sync", &self.path)(error));
            places.clear();
            position = room.end;
        }
        if matches!(outcome, Err(CacheError::Io { .. })) {
            room.quota = position;
            // Best effort: what stays of a record lies behind the last whole one and is cut off at the next start.
            let _ = self.own.file.set_len(position);
        }
        room.end = position;
        let mut index = self.index();
        places.into_iter().for_each(|place| add(&mut index, place));
        outcome
    }

    /// Gives all of its room back and takes none any more; false when it has none.
    pub fn give_way(&self) -> bool {
        let mut room = self.room();
        room.quota = 0;
        if room.end == 0 {
            return false;
        }
        self.index().retain(|_, places| {
            places.retain(|place| !Arc::ptr_eq(&place.file, &self.own));
            !places.is_empty()
        });
        match self.own.file.set_len(0) {
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
        let rows = &self.own.layout.row_bytes;
        if states.formats != self.key.formats() || !states.taps.iter().map(Bytes::len).eq(rows.iter().map(|row| row * states.tokens)) {
            return Err(CacheError::Shape { expected: states.tokens * rows.iter().sum::<usize>(), found: states.bytes() });
        }
        let needed = offset + self.own.layout.record_bytes(states.tokens);
        if needed > quota {
            return Err(CacheError::Full { path: self.path.clone(), needed, quota });
        }
        self.own.write(sample, states, offset)
    }

    /// States of a sequence, `index` 0. [`CacheError::Damaged`] once for a damaged record, which is missing from then on.
    pub fn get(&self, sample: &SampleKey) -> Result<Option<SequenceStates>, CacheError> {
        let place = self.index().get(sample).and_then(|places| places.last().cloned());
        let Some(Place { file, offset, header }) = place else { return Ok(None) };
        let taps = file.read(offset, &header).inspect_err(|_| self.forget(sample, &file, offset))?;
        Ok(Some(SequenceStates { index: 0, tokens: header.tokens as usize, formats: self.key.formats(), taps }))
    }

    /// Does not look for a record there again.
    fn forget(&self, sample: &SampleKey, file: &Arc<RecordFile>, offset: u64) {
        let mut index = self.index();
        if let Some(places) = index.get_mut(sample) {
            places.retain(|place| place.offset != offset || !Arc::ptr_eq(&place.file, file));
            if places.is_empty() {
                index.remove(sample);
            }
        }
        self.damaged.fetch_add(1, Ordering::Relaxed);
    }
}

impl Drop for StateCache {
    fn drop(&mut self) {
        if self.others.is_some() && self.room().end == 0 {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Adds a place; later ones are read first, and within a file replace the earlier.
fn add(index: &mut Index, place: Place) {
    let places = index.entry(place.header.sample).or_default();
    places.retain(|earlier| !Arc::ptr_eq(&earlier.file, &place.file));
    places.push(place);
}

/// The folder of `key` under `folder`, which says what it is of.
fn create(folder: &Path, key: &CacheKey) -> Result<PathBuf, CacheError> {
    let name = carryon_crds::wire::digest(key.text().as_bytes()).replace("sha256:", "states-")[..23].to_owned();
    let own = folder.join(name);
    fs::create_dir_all(&own).map_err(io_error("create", &own))?;
    let key_file = own.join(KEY_FILE);
    if !key_file.exists() {
        crate::files::write_atomic(&key_file, key.text().as_bytes()).map_err(io_error("write", &key_file))?;
    }
    Ok(own)
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
