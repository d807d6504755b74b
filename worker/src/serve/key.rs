//! An API key that clients may send, in a file that its owner may change at any time: a kubelet renews a mounted Secret in place.

use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use carryon_crds::wire::gateway::MAX_KEY_BYTES;
use carryon_crds::wire::{KeyState, digest};

/// How long a change may go unseen.
pub(super) const PERIOD: Duration = Duration::from_secs(1);

/// The key in a file.
pub(super) struct Key {
    path: PathBuf,
    known: Mutex<Known>,
}

#[derive(Default)]
struct Known {
    read: Option<Instant>,
    /// How the key was found, and its digest. Without a digest, nothing fits.
    key: Option<(KeyState, Option<String>)>,
}

impl Key {
    pub(super) fn new(path: PathBuf) -> Self {
        Self { path, known: Mutex::default() }
    }

    /// Whether `sent` is the key. Digests are compared, so that the time taken says nothing of it.
    pub(super) fn fits(&self, sent: Option<&[u8]>, now: Instant) -> bool {
        matches!((&self.known(now).key, sent), (Some((_, Some(key))), Some(sent)) if digest(sent) == *key)
    }

    /// How it is found.
    pub(super) fn state(&self, now: Instant) -> KeyState {
        self.known(now).key.as_ref().map_or(KeyState::Missing, |(state, _)| *state)
    }

    fn known(&self, now: Instant) -> MutexGuard<'_, Known> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.read.is_none_or(|read| now.duration_since(read) >= PERIOD) {
            known.read = Some(now);
            known.learn(read(&self.path), &self.path);
        }
        known
    }
}

impl Known {
    fn learn(&mut self, found: (KeyState, Option<String>), path: &Path) {
        let found = Some(found);
        if self.key == found {
            return;
        }
        match &found {
            Some((state, None)) => tracing::error!("there is no API key in {path:?}, so that none fits: {state:?}"),
            _ if self.key.is_some() => tracing::info!("the API key in {path:?} has changed"),
            _ => {}
        }
        self.key = found;
    }
}

/// How the key is found, and its digest.
fn read(path: &Path) -> (KeyState, Option<String>) {
    let mut content = Vec::new();
    let opened = std::fs::File::open(path);
    match opened.and_then(|file| file.take(MAX_KEY_BYTES as u64 + 1).read_to_end(&mut content)) {
        Ok(_) => {
            let (state, key) = KeyState::of(&content);
            (state, key.map(digest))
        }
        Err(_) => (KeyState::Missing, None),
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
        assert_eq!(key.state(at(0)), KeyState::Missing);
        for (second, content, fitting) in [(1, "old\n", "old"), (2, "new", "new")] {
            std::fs::write(&path, content).unwrap();
            assert!(key.fits(Some(fitting.as_bytes()), at(second)) && !key.fits(Some(b"other"), at(second)) && !key.fits(None, at(second)));
        }
        assert!(!key.fits(Some(b"old"), at(2)));
        for (second, content) in [(3, String::new()), (4, " \n".to_owned()), (5, "x".repeat(MAX_KEY_BYTES + 1))] {
            std::fs::write(&path, &content).unwrap();
            assert!(!key.fits(Some(content.as_bytes()), at(second)) && !key.fits(Some(b"new"), at(second)), "second {second}");
        }
    }
}
