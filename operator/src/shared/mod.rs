//! What the three kinds need alike.

pub mod defaults;
pub mod gpu;
pub mod kstatus;
pub mod meta;
pub mod network_policy;
pub mod pods;
pub mod revision;
pub mod rollout;
pub mod said;
pub mod sharing;
pub mod text;
pub mod trouble;
pub mod worker;

use self::defaults::PodDefaults;
use self::network_policy::Peers;

/// Why an object cannot be built now; becomes its conditions.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Refusal {
    /// CamelCase reason.
    pub reason: &'static str,
    /// Names the object at fault and what to do.
    pub message: String,
    /// Whether only a change by the user helps (Stalled), or waiting may (Reconciling).
    pub permanent: bool,
}

impl Refusal {
    /// Something that is not there yet.
    pub fn waiting(reason: &'static str, message: impl Into<String>) -> Self {
        Self { reason, message: message.into(), permanent: false }
    }

    /// Something the user has to change.
    pub fn permanent(reason: &'static str, message: impl Into<String>) -> Self {
        Self { reason, message: message.into(), permanent: true }
    }
}

/// What came of an object: what was validated and applied, or what is in the way.
pub type Outcome<V, A> = Result<(V, A), Refusal>;

/// What the operator itself is configured with.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Worker image of pods that are rendered today and whose object names none.
    pub worker_image: String,
    /// The one that is built for CUDA, for pools that ask for a GPU.
    pub worker_cuda_image: Option<String>,
    /// User, and group of written volumes, of pods; none where the cluster picks them.
    pub pod_user: Option<i64>,
    /// What pods that are rendered today get beside what their objects say.
    pub pod_defaults: PodDefaults,
    /// Who is let through NetworkPolicies; none where there are to be no policies.
    pub peers: Option<Peers>,
}

impl Default for Settings {
    fn default() -> Self {
        // As distroless images call their user "nonroot".
        let worker_image = concat!("ghcr.io/carry-on/worker:", env!("CARGO_PKG_VERSION")).to_owned();
        Self { worker_image, worker_cuda_image: None, pod_user: Some(65_532), pod_defaults: PodDefaults::default(), peers: None }
    }
}
