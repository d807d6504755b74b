//! A container's termination message: its termination log, or the end of its log when it failed without a word.

use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::Path;

use super::folders::Folders;
use super::store::Key;

/// Bytes of a termination message, as a kubelet bounds it.
const MESSAGE_BYTES: u64 = 4096;
/// Bytes of the log that stand in for one.
const LOG_BYTES: u64 = 2048;

/// The last words of the pod's container that ended with `exit_code`.
pub fn read(folders: &Folders, pod: &Key, exit_code: i32) -> Option<String> {
    let written = head(&folders.pod(&pod.namespace, &pod.name).join("termination-log")).filter(|text| !text.is_empty());
    // A signal comes from outside: what was logged before has nothing to do with it.
    written.or_else(|| (1..=128).contains(&exit_code).then(|| tail(&folders.log(&pod.namespace, &pod.name)))?)
}

fn head(path: &Path) -> Option<String> {
    let mut bytes = Vec::new();
    File::open(path).ok()?.take(MESSAGE_BYTES).read_to_end(&mut bytes).ok()?;
    Some(String::from_utf8_lossy(&bytes).into_owned())
}

fn tail(path: &Path) -> Option<String> {
    let mut file = File::open(path).ok()?;
    let length = file.metadata().ok()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(LOG_BYTES))).ok()?;
    let mut bytes = Vec::new();
    file.take(LOG_BYTES).read_to_end(&mut bytes).ok()?;
    Some(String::from_utf8_lossy(&bytes).into_owned())
}
