//! A cache that several processes use at once, on one machine or on several that mount one volume.
//!
//! Each process writes a file of its own and reads everybody's, so nothing depends on locks to stay whole. Who asks the base for a sequence is
//! settled by a claim, a link in `asking/` that only one can create. A claim whose holder is gone is taken over; where the file system cannot say,
//! after a while. **Invariant** the worst that a lost, late or doubted claim costs is that a sequence is asked for twice.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use carryon_crds::wire::hex;

use super::record::Header;
use super::records::{Layout, RecordFile, open};
use super::{CacheKey, KEY_FILE, SampleKey};

/// How long somebody else's answer is waited for before the sequence is asked for again.
pub const CLAIM_PATIENCE: Duration = Duration::from_secs(60);

const CLAIMS_FOLDER: &str = "asking";
const EXTENSION: &str = "bin";

/// Whose turn it is to ask for a sequence.
#[derive(Debug)]
pub enum Turn {
    /// Ours, until the claim is dropped.
    Ours(Claim),
    /// Somebody else's: its states are to be in the cache soon.
    Theirs,
}

/// The right to ask for a sequence; given back when dropped.
#[derive(Debug, Default)]
pub struct Claim(Option<(PathBuf, String)>);

impl Drop for Claim {
    fn drop(&mut self) {
        // One that was taken over is another's.
        if let Some((path, writer)) = self.0.take()
            && holder(&path).as_ref() == Some(&writer)
        {
            let _ = fs::remove_file(path);
        }
    }
}

/// The others of a shared cache.
#[derive(Debug)]
pub(super) struct Shared {
    /// Where the caches of all keys lie.
    root: PathBuf,
    /// That of our key.
    own: PathBuf,
    /// Our name: that of our file, without its ending.
    writer: String,
    seen: Mutex<Seen>,
}

/// What was seen of the others.
#[derive(Debug, Default)]
struct Seen {
    /// Every folder, and how its records are read if they hold what we want.
    folders: BTreeMap<PathBuf, Option<Layout>>,
    /// Every file, with the end of the last record that was found in it.
    files: BTreeMap<PathBuf, (Arc<RecordFile>, u64)>,
}

impl Shared {
    /// Begins a file of our own in `own`, a folder of `root`; it is locked for as long as it is open.
    pub(super) fn begin(root: &Path, own: &Path) -> io::Result<(Self, PathBuf, File)> {
        fs::create_dir_all(own.join(CLAIMS_FOLDER))?;
        let writer = format!("{:032x}", rand::random::<u128>());
        let path = own.join(&writer).with_extension(EXTENSION);
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(&path)?;
        // Where there are no locks, a claim is doubted after a while only.
        let _ = file.try_lock();
        Ok((Self { root: root.to_owned(), own: own.to_owned(), writer, seen: Mutex::default() }, path, file))
    }

    /// Records that came since the last time, with the files they lie in. What cannot be read is as if it were not there.
    pub(super) fn news(&self, key: &CacheKey) -> Vec<(Arc<RecordFile>, u64, Header)> {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let Seen { folders, files } = &mut *seen;
        for folder in entries(&self.root) {
            if !folders.contains_key(&folder)
                && let Ok(text) = fs::read_to_string(folder.join(KEY_FILE))
            {
                folders.insert(folder, key.layout_in(&text));
            }
        }
        let mut news = Vec::new();
        for (folder, layout) in folders.iter().filter_map(|(folder, layout)| Some((folder, layout.as_ref()?))) {
            let foreign = |path: &PathBuf| path.extension().is_some_and(|ending| ending == EXTENSION) && !self.is_own(path);
            for path in entries(folder).filter(foreign) {
                if !files.contains_key(&path)
                    && let Ok(file) = open(&path, layout)
                {
                    files.insert(path.clone(), (Arc::new(file), 0));
                }
                let Some((file, end)) = files.get_mut(&path) else { continue };
                let length = file.file.metadata().map_or(0, |metadata| metadata.len());
                // Not by the length at the last look: rows that fill their pages have that of the whole record before its header is there.
                if length == *end {
                    continue;
                }
                if let Ok(scan) = file.scan((*end).min(length), length) {
                    *end = scan.end;
                    news.extend(scan.records.into_iter().map(|(offset, header)| (file.clone(), offset, header)));
                }
            }
        }
        news
    }

    /// Bytes of the others' records.
    pub(super) fn bytes(&self) -> u64 {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).files.values().map(|(_, end)| end).sum()
    }

    /// Claims a sequence, unless somebody who lives and was not waited for too long has done so.
    pub(super) fn claim(&self, sample: &SampleKey, waited: Duration) -> Turn {
        let name = hex(&sample.0);
        let held = |folder: &Path| {
            let holder = holder(&folder.join(CLAIMS_FOLDER).join(&name));
            holder.is_some_and(|holder| waited < CLAIM_PATIENCE && self.lives(folder, &holder))
        };
        let wider: Vec<PathBuf> = {
            let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
            let readable = seen.folders.iter().filter(|(_, layout)| layout.is_some());
            readable.map(|(folder, _)| folder.clone()).filter(|folder| *folder != self.own).collect()
        };
        if wider.iter().any(|folder| held(folder)) {
            return Turn::Theirs;
        }
        let path = self.own.join(CLAIMS_FOLDER).join(&name);
        for _ in 0..2 {
            match symlink(&self.writer, &path) {
                Ok(()) => return Turn::Ours(Claim(Some((path, self.writer.clone())))),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                // Full, not ours to write, or no place for links: each asks for itself.
                Err(_) => break,
            }
            if held(&self.own) {
                return Turn::Theirs;
            }
            let _ = fs::remove_file(&path);
        }
        Turn::Ours(Claim::default())
    }

    /// Whether a writer is there still, as far as the file system can say.
    fn lives(&self, folder: &Path, writer: &str) -> bool {
        if writer == self.writer {
            return true;
        }
        let named = writer.bytes().all(|byte| byte.is_ascii_hexdigit());
        let Some(Ok(file)) = named.then(|| File::open(folder.join(writer).with_extension(EXTENSION))) else { return false };
        match file.try_lock_shared() {
            Ok(()) => false,
            Err(TryLockError::WouldBlock | TryLockError::Error(_)) => true,
        }
    }

    fn is_own(&self, path: &Path) -> bool {
        path.parent() == Some(&*self.own) && path.file_stem().is_some_and(|stem| *stem == *self.writer)
    }
}

/// Who holds a claim; None when there is none. A claim is a link that points to its holder's name: it is there whole, or not at all.
fn holder(path: &Path) -> Option<String> {
    fs::read_link(path).ok()?.into_os_string().into_string().ok()
}

fn entries(folder: &Path) -> impl Iterator<Item = PathBuf> + use<> {
    fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path())
}
