//! The three conditions that kstatus, Argo CD and Flux read, from one verdict.

use carryon_crds::condition::Verdict;
use carryon_crds::condition::types::{READY, RECONCILING, STALLED};

use super::Refusal;

/// Where an object stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Standing {
    /// The one of the three conditions that holds.
    holds: &'static str,
    /// CamelCase reason.
    reason: &'static str,
    /// One sentence.
    message: String,
}

impl Standing {
    /// As wanted.
    pub fn current(reason: &'static str, message: impl Into<String>) -> Self {
        Self { holds: READY, reason, message: message.into() }
    }

    /// On its way; waiting helps.
    pub fn in_progress(reason: &'static str, message: impl Into<String>) -> Self {
        Self { holds: RECONCILING, reason, message: message.into() }
    }

    /// Only a change by the user helps.
    pub fn stalled(reason: &'static str, message: impl Into<String>) -> Self {
        Self { holds: STALLED, reason, message: message.into() }
    }

    /// Whether it is as wanted.
    pub fn is_current(&self) -> bool {
        self.holds == READY
    }

    /// `Ready`, `Reconciling` and `Stalled`, all three always present.
    pub fn verdicts(&self) -> Vec<Verdict> {
        let verdict = |type_| Verdict { type_, holds: type_ == self.holds, reason: self.reason, message: self.message.clone() };
        [READY, RECONCILING, STALLED].map(verdict).into()
    }
}

impl From<&Refusal> for Standing {
    fn from(refusal: &Refusal) -> Self {
        let Refusal { reason, message, permanent } = refusal;
        if *permanent { Self::stalled(reason, message) } else { Self::in_progress(reason, message) }
    }
}
