//! What a fetch of a model says while it runs and when it ends.

use serde::{Deserialize, Serialize};

/// Answer of a fetch's `GET /progress`, its last words in the termination log, and content of the file `.fetch.json` in the model's folder.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct FetchReport {
    /// `listing`, `waiting` (for another one that fetches the same), `fetching`, `retrying` (its source has broken off), `complete`, `stopped` or `failed`.
    pub state: String,
    /// Bytes that are there.
    pub bytes: u64,
    /// Bytes of the whole model; 0 until known.
    pub total: u64,
    /// Estimated seconds to the end.
    pub eta_seconds: Option<u64>,
    /// One sentence.
    pub message: String,
    /// What a hub's revision was resolved to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub commit: Option<String>,
    /// Why it failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failure: Option<FetchFailure>,
}

/// Whether a revision of a hub's repository is a commit already, a whole one: the short forms that hubs take too may come to mean two.
pub fn is_commit(revision: &str) -> bool {
    revision.len() == 40 && revision.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// Why a fetch failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FetchFailure {
    /// No token or credentials, or none that may read it.
    AccessDenied,
    /// There is no such repository, revision, bucket or file.
    NotFound,
    /// The source did not answer, or broke off, again and again.
    Unreachable,
    /// No authority that is trusted has signed its certificate.
    Untrusted,
    /// The file with authorities of one's own cannot be read.
    CaBundle,
    /// The volume is too small.
    VolumeFull,
    /// The volume cannot be written.
    VolumeReadOnly,
    /// What came is not what the source promised.
    Damaged,
    /// No decoder of ours runs such a model.
    Unsupported,
    /// Whatever else its message says; and what later workers say.
    #[serde(other)]
    Other,
}
