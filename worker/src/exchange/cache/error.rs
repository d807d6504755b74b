//! What can go wrong with a cache.

use std::io;
use std::path::PathBuf;

/// What can go wrong with a cache.
#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    /// The file system refused.
    #[error("failed to {action} {path:?}: {source}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// Another process has the cache open.
    #[error("cache {0:?} is in use by another process")]
    InUse(PathBuf),
    /// The record's checksum is wrong. It is forgotten: fetch the states again.
    #[error("cache {path:?} is damaged: the record of {tokens} tokens at byte {offset} has a wrong checksum")]
    Damaged {
        /// Which file.
        path: PathBuf,
        /// Where in it.
        offset: u64,
        /// Length of the sequence.
        tokens: usize,
    },
    /// The record does not fit any more; the cache goes on serving what it has.
    #[error("cache {path:?} is full: {needed} bytes are needed, {quota} is the quota")]
    Full {
        /// Which cache.
        path: PathBuf,
        /// Bytes with this record.
        needed: u64,
        /// Bytes that are allowed.
        quota: u64,
    },
    /// States of another shape than the cache's key says.
    #[error("states of {found} bytes do not fit the cache: {expected} expected")]
    Shape {
        /// Bytes over all taps by the key.
        expected: usize,
        /// Bytes that were given.
        found: usize,
    },
}
