//! The folder of a model: names that a fetch keeps for itself, one fetch at a time, and whether there is room.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::path::Path;
use std::time::{Duration, Instant};

use super::error::FetchError;
use super::progress::{self, REPORT};

/// How names begin that a fetch keeps for itself.
pub const RESERVED: &str = ".fetch";
/// Name of the manifest.
pub const MANIFEST: &str = ".fetch-manifest.json";
/// End of the name of a file that is not whole yet.
pub const PART: &str = ".part";
/// End of the name of what is known of such a file.
pub const RECORD: &str = ".part.json";
/// The file that is locked. It is never removed: who removed it would let two lock two files of one name.
const LOCK: &str = ".fetch.lock";

/// Between two looks at a lock.
const LOOK: Duration = Duration::from_millis(250);
/// Between two lines of somebody who waits.
const LINE_INTERVAL: Duration = Duration::from_secs(10);

/// Bytes of the file at `path`, if it is one.
pub fn size(path: &Path) -> Option<u64> {
    fs::metadata(path).ok().filter(fs::Metadata::is_file).map(|metadata| metadata.len())
}

/// Keeps others out of the folder until it is dropped; the kernel gives it back when its process dies.
pub struct Lock {
    _file: File,
}

/// Locks `folder`, waiting while another process fetches into it.
///
/// # Errors
/// The folder cannot be made, or takes no file.
pub async fn lock(folder: &Path) -> Result<Lock, FetchError> {
    fs::create_dir_all(folder).map_err(FetchError::file("create", folder))?;
    let path = folder.join(LOCK);
    let opened = OpenOptions::new().create(true).truncate(false).write(true).open(&path);
    // One that a process with another UID made can be locked all the same.
    let file = opened.or_else(|_| File::open(&path)).map_err(FetchError::file("open", &path))?;
    let mut told: Option<Instant> = None;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(Lock { _file: file }),
            Err(TryLockError::WouldBlock) => {
                if told.is_none_or(|told| told.elapsed() >= LINE_INTERVAL) {
                    let report = progress::read(&folder.join(REPORT)).map_or_else(String::new, |report| format!(": {}", report.message));
                    tracing::info!("waiting for another process that fetches into {folder:?}{report}");
                    told = Some(Instant::now());
                }
                tokio::time::sleep(LOOK).await;
            }
            Err(TryLockError::Error(error)) => {
                tracing::warn!("the volume of {folder:?} has no file locks ({error}): let no two processes fetch into it at once");
                return Ok(Lock { _file: file });
            }
        }
    }
}

/// Bytes that the volume of `folder` has for this user.
///
/// # Errors
/// The folder is not there.
pub fn free(folder: &Path) -> Result<u64, FetchError> {
    let volume = rustix::fs::statvfs(folder).map_err(|error| FetchError::file("inspect", folder)(error.into()))?;
    Ok(volume.f_bavail.saturating_mul(volume.f_frsize))
}

/// That `needed` more bytes fit.
///
/// # Errors
/// [`FetchError::NoRoom`].
pub fn check_room(folder: &Path, needed: u64) -> Result<(), FetchError> {
    let free = free(folder)?;
    if needed > free { Err(FetchError::NoRoom { folder: folder.to_owned(), needed, free }) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_second_fetch_waits_until_the_first_is_gone() {
        let folder = tempfile::tempdir().unwrap();
        let first = lock(folder.path()).await.unwrap();
        let second = tokio::time::timeout(Duration::from_millis(20), lock(folder.path()));
        assert!(second.await.is_err());
        drop(first);
        lock(folder.path()).await.unwrap();
    }

    #[test]
    fn what_does_not_fit_is_said_with_figures() {
        let folder = tempfile::tempdir().unwrap();
        check_room(folder.path(), 1).unwrap();
        let error = check_room(folder.path(), u64::MAX).unwrap_err().to_string();
        assert!(error.contains(&u64::MAX.to_string()) && error.contains("are free"), "{error}");
    }
}
