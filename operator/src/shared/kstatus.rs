//! The three conditions that kstatus, Argo CD and Flux read, from one verdict.

use carryon_crds::condition::Verdict;
use carryon_crds::condition::types::{READY, RECONCILING, STALLED};

use super::Refusal;

/// Where an object stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Standing {
    /// As wanted.
    Current {
        /// CamelCase reason.
        reason: &'static str,
        /// One sentence.
        message: String,
    },
    /// On its way; waiting helps.
    InProgress {
        /// CamelCase reason.
        reason: &'static str,
        /// One sentence.
        message: String,
    },
    /// Only a change by the user helps.
    Stalled {
        /// CamelCase reason.
        reason: &'static str,
        /// One sentence.
        message: String,
    },
}

impl Standing {
    /// As wanted.
    pub fn current(reason: &'static str, message: impl Into<String>) -> Self {
        Self::Current { reason, message: message.into() }
    }

    /// On its way.
    pub fn in_progress(reason: &'static str, message: impl Into<String>) -> Self {
        Self::InProgress { reason, message: message.into() }
    }

    /// Needs a change by the user.
    pub fn stalled(reason: &'static str, message: impl Into<String>) -> Self {
        Self::Stalled { reason, message: message.into() }
    }

    /// `Ready`, `Reconciling` and `Stalled`, all three always present.
    pub fn verdicts(&self) -> Vec<Verdict> {
        let (ready, reconciling, stalled, reason, message) = match self {
            Self::Current { reason, message } => (true, false, false, *reason, message),
            Self::InProgress { reason, message } => (false, true, false, *reason, message),
            Self::Stalled { reason, message } => (false, false, true, *reason, message),
        };
        let verdict = |type_, holds| Verdict { type_, holds, reason, message: message.clone() };
        vec![verdict(READY, ready), verdict(RECONCILING, reconciling), verdict(STALLED, stalled)]
    }
}

impl From<&Refusal> for Standing {
    fn from(refusal: &Refusal) -> Self {
        let Refusal { reason, message, permanent } = refusal;
        if *permanent { Self::stalled(reason, message) } else { Self::in_progress(reason, message) }
    }
}
