//! The digest of a checkpoint's files, made while its tensors are loaded: the disk is read once, whoever comes second finds its bytes in memory.

use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;

use carryon_crds::wire;
use sha2::{Digest as _, Sha256};

use super::error::ModelError;

/// Bytes that are read at a time.
const PIECE: usize = 1 << 20;

/// A digest in the making. Dropped, it is given up.
pub struct DigestBeside {
    thread: JoinHandle<Result<String, ModelError>>,
    /// As long as it lives, somebody waits for the digest.
    wanted: Arc<()>,
}

impl DigestBeside {
    /// Starts on `files`, one after the other.
    pub(super) fn start(files: Vec<(PathBuf, Arc<File>)>) -> Self {
        let wanted = Arc::new(());
        let asked = Arc::downgrade(&wanted);
        Self { thread: std::thread::spawn(move || digest(&files, &asked)), wanted }
    }

    /// Waits for `sha256:…`.
    ///
    /// # Errors
    /// When a file cannot be read.
    pub fn join(self) -> Result<String, ModelError> {
        let digest = self.thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        drop(self.wanted);
        digest
    }
}

fn digest(files: &[(PathBuf, Arc<File>)], asked: &Weak<()>) -> Result<String, ModelError> {
    let (mut hasher, mut piece) = (Sha256::new(), vec![0; PIECE]);
    for (path, file) in files {
        let mut position = 0;
        while asked.strong_count() > 0 {
            match file.read_at(&mut piece, position) {
                Ok(0) => break,
                Ok(count) => {
                    hasher.update(&piece[..count]);
                    position += count as u64;
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(ModelError::read(path)(error)),
            }
        }
    }
    Ok(wire::digest_of(hasher))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_that_nobody_waits_for_is_given_up() {
        let endless = Arc::new(File::open("/dev/zero").unwrap());
        let digest = DigestBeside::start(vec![("/dev/zero".into(), endless.clone())]);
        assert_eq!(Arc::strong_count(&endless), 2);
        drop(digest);
        while Arc::strong_count(&endless) > 1 {
            std::thread::yield_now();
        }
    }
}
