//! What can go wrong between a client and its pool.

use super::Endpoint;
use crate::exchange::frames::FrameError;
use crate::exchange::wire::WireError;

/// Why a pool did not answer as asked.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// A pool's address cannot be used; permanent.
    #[error("pool address {url:?}: {reason}")]
    Address {
        /// The address as given.
        url: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Nobody listens, or the name does not resolve; tried until the deadline.
    #[error("failed to reach pool {address}: {reason}")]
    Unreachable {
        /// Where the client tried last.
        address: String,
        /// Why it failed there.
        reason: String,
    },
    /// The connection broke after the pool began to answer; tried until the deadline where asking again is safe.
    #[error("pool {endpoint} stopped inside its answer to {what}: {reason}")]
    Interrupted {
        /// Who answered.
        endpoint: Endpoint,
        /// What was asked.
        what: String,
        /// How it broke.
        reason: String,
    },
    /// The pool does not hold the head: push it to `endpoint` and ask again.
    #[error("pool {endpoint} lacks the head: {message}")]
    HeadMissing {
        /// Who lacks it.
        endpoint: Endpoint,
        /// In the pool's words.
        message: String,
    },
    /// The pool refused; tried until the deadline when the code is transient.
    #[error("pool {endpoint} refused {what} ({status}): {error}")]
    Refused {
        /// Who refused.
        endpoint: Endpoint,
        /// What was asked.
        what: String,
        /// HTTP status.
        status: u16,
        /// In the pool's words.
        error: WireError,
    },
    /// The pool is of an earlier version and would answer as if `member` had not been sent.
    #[error("pool {endpoint} is of an earlier version: it does not know {member}")]
    Outdated {
        /// Who answered.
        endpoint: Endpoint,
        /// What it does not know.
        member: &'static str,
    },
    /// The pool computes in another way than before: caches are void, heads want evaluating again.
    #[error("pool {endpoint} computes with {found:?}, expected {expected:?}")]
    NumericsChanged {
        /// Who answered.
        endpoint: Endpoint,
        /// What the client was bound to.
        expected: String,
        /// What the pool says now.
        found: String,
    },
    /// The answer is not what the protocol promises.
    #[error("pool {endpoint} answered {what} with something unreadable: {reason}")]
    Unreadable {
        /// Who answered.
        endpoint: Endpoint,
        /// What was asked.
        what: String,
        /// What is wrong with it.
        reason: String,
    },
}

impl ClientError {
    /// Whether asking again later may succeed.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Unreachable { .. } | Self::Interrupted { .. } => true,
            Self::Refused { status, error, .. } => error.code.is_transient() || matches!(status, 408 | 429 | 502 | 503 | 504),
            _ => false,
        }
    }

    /// A frame that cannot be read: a truncated one is an interruption.
    pub(super) fn frame(endpoint: &Endpoint, what: &str, error: &FrameError) -> Self {
        let (endpoint, what, reason) = (endpoint.clone(), what.to_owned(), error.to_string());
        match error {
            FrameError::Truncated { .. } => Self::Interrupted { endpoint, what, reason },
            _ => Self::Unreadable { endpoint, what, reason },
        }
    }
}

/// An error with its causes, which reqwest leaves out of its text.
pub(super) fn with_causes(error: &(dyn std::error::Error + 'static)) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}
