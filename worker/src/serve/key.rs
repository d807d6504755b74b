//! An API key that clients may send, in a file that its owner may change at any time: a kubelet renews a mounted Secret in place.

use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use carryon_crds::wire::digest;

/// How long a change may go unseen.
const PERIOD: Duration = Duration::from_secs(1);
/// Longest key, bytes.
const MAX_BYTES: u64 = 64 << 10;

/// The key in a file.
pub(super) struct Key {
    path: PathBuf,
    known: Mutex<Known>,
}

#[derive(Default)]
struct Known {
    read: Option<Instant>,
    /// Digest of the key; or why there is none, and none fits.
    key: Option<Result<String, String>>,
}

impl Key {
    pub(super) fn new(path: PathBuf) -> Self {
        Self { path, known: Mutex::default() }
    }

    /// Whether `sent` is the key. Digests are compared, so that the time taken says nothing of it. Without a key, nothing fits.
    pub(super) fn fits(&self, sent: Option<&[u8]>, now: Instant) -> bool {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.read.is_none_or(|read| now.duration_since(read) >= PERIOD) {
            known.read = Some(now);
            known.learn(read(&self.path), &self.path);
        }
        matches!((&known.key, sent), (Some(Ok(key)), Some(sent)) if digest(sent) == *key)
    }
}

impl Known {
    fn learn(&mut self, found: Result<String, String>, path: &Path) {
        let found = Some(found);
        if self.key == found {
            return;
        }
        match &found {
            Some(Err(reason)) => tracing::error!("there is no API key in {path:?}, so that none fits: {reason}"),
            _ if self.key.is_some() => tracing::info!("the API key in {path:?} has changed"),
            _ => {}
        }
        self.key = found;
    }
}

/// Digest of the key. White space around it cannot be sent in a header: it is of the file.
fn read(path: &Path) -> Result<String, String> {
    let file = std::fs::File::open(path).map_err(|error| error.to_string())?;
    let mut content = Vec::new();
    file.take(MAX_BYTES + 1).read_to_end(&mut content).map_err(|error| error.to_string())?;
    match content.trim_ascii() {
        [] => Err("it is empty".to_owned()),
        _ if content.len() as u64 > MAX_BYTES => Err(format!("it is longer than {MAX_BYTES} bytes")),
        key => Ok(digest(key)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_changed_key_counts_within_a_period_and_without_one_nothing_fits() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("key");
        let (key, start) = (Key::new(path.clone()), Instant::now());
        let at = |second: u32| start + second * PERIOD;
        assert!(!key.fits(Some(b""), at(0)), "no file");
        for (second, content, fitting) in [(1, "old\n", "old"), (2, "new", "new")] {
            std::fs::write(&path, content).unwrap();
            assert!(key.fits(Some(fitting.as_bytes()), at(second)) && !key.fits(Some(b"other"), at(second)) && !key.fits(None, at(second)));
        }
        assert!(!key.fits(Some(b"old"), at(2)));
        for (second, content) in [(3, String::new()), (4, " \n".to_owned()), (5, "x".repeat(MAX_BYTES as usize + 1))] {
            std::fs::write(&path, &content).unwrap();
            assert!(!key.fits(Some(content.as_bytes()), at(second)) && !key.fits(Some(b"new"), at(second)), "second {second}");
        }
    }
}
