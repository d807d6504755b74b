//! What can go wrong with a request.

/// Why an object could not be reconciled; it is tried again.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// A request failed.
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
}

impl Failure {
    /// The step, for metrics.
    pub fn step(&self) -> &'static str {
        match self {
            Self::Api { step, .. } => step,
            Self::Deleted => "read",
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
