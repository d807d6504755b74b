//! What keeps an object from being as it should.

use kube::{Resource, ResourceExt as _};

use crate::shared::Refusal;
use crate::shared::text::{WORDS, bounded};

/// Why an object could not be reconciled.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// A request failed; it is tried again.
    #[error("failed to {step} {what}: {source}")]
    Api {
        /// `read`, `apply`, `create`, `delete` or `write the status of`.
        step: &'static str,
        /// Kind, namespace and name.
        what: String,
        /// What the API server or the way to it said.
        source: Box<kube::Error>,
    },
    /// The object is gone, or on its way; its cache is still to hear of it.
    #[error("the object was deleted meanwhile")]
    Deleted,
    /// The user, or somebody with more rights than we have, must change something.
    #[error(transparent)]
    Refused(#[from] Refusal),
}

impl Failure {
    /// Of a request that was to `step` `what`.
    pub fn of(step: &'static str, what: impl Into<String>) -> impl FnOnce(kube::Error) -> Self {
        let what = what.into();
        move |error| Self::Api { step, what, source: Box::new(error) }
    }

    /// Of a request that was to `step` a child: what the cluster refuses for good becomes a condition, all else is tried again.
    pub fn of_child<K: Resource<DynamicType = ()>>(step: &'static str, child: &K) -> impl FnOnce(kube::Error) -> Self {
        let what = path(child);
        move |error| {
            let said = match &error {
                kube::Error::Api(status) => bounded(&status.message, WORDS),
                other => other.to_string(),
            };
            let (reason, message) = match code(&error) {
                403 if said.contains("being terminated") => ("NamespaceTerminating", "the namespace is being deleted".to_owned()),
                403 => {
                    let advice = "give the operator the permission, or the namespace the quota";
                    ("Forbidden", format!("may not {step} {what}: {said}; {advice}"))
                }
                400 | 422 => ("Rejected", format!("cannot {step} {what}: {said}")),
                500 => match silent_webhook(&said) {
                    Some(webhook) => {
                        ("WebhookUnavailable", format!("cannot {step} {what}: the admission webhook {webhook} does not answer"))
                    }
                    None => return Self::of(step, what)(error),
                },
                _ => return Self::of(step, what)(error),
            };
            Refusal::waiting(reason, message).into()
        }
    }

    /// The step, for metrics.
    pub fn step(&self) -> &'static str {
        match self {
            Self::Api { step, .. } => step,
            Self::Deleted => "read",
            Self::Refused(_) => "apply",
        }
    }
}

/// HTTP status of an answer; 0 when there was none.
pub fn code(error: &kube::Error) -> u16 {
    match error {
        kube::Error::Api(status) => status.code,
        _ => 0,
    }
}

/// The webhook that the API server could not ask. What it says beyond the name may differ from time to time, and has no place in a status.
fn silent_webhook(said: &str) -> Option<&str> {
    let (_, after) = said.split_once("failed calling webhook \"")?;
    after.split_once('"').map(|(name, _)| name)
}

/// `KIND NAMESPACE/NAME`.
pub fn path<K: Resource<DynamicType = ()>>(object: &K) -> String {
    format!("{} {}/{}", K::kind(&()), object.namespace().unwrap_or_default(), object.name_any())
}
