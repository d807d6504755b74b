//! Conditions, the way kstatus and `kubectl wait` read them.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};

/// Condition types shared by the three kinds.
pub mod types {
    /// The object does what it is for.
    pub const READY: &str = "Ready";
    /// A pod answers, be it of the present spec or of one before.
    pub const AVAILABLE: &str = "Available";
    /// The controller is still working towards the spec (kstatus: InProgress).
    pub const RECONCILING: &str = "Reconciling";
    /// Progress needs a change by the user (kstatus: Failed).
    pub const STALLED: &str = "Stalled";
    /// A job's head is written; final.
    pub const COMPLETE: &str = "Complete";
    /// A job has given up; final.
    pub const FAILED: &str = "Failed";
    /// No node of the cluster could hold a pod of the pool, were it empty. For information: an autoscaler may bring one.
    pub const NO_NODE_FITS: &str = "NoNodeFits";
    /// What a job's trainer would take of memory, by what it is for; false where its limit is less. For information: nothing waits for it.
    pub const MEMORY_PLANNED: &str = "MemoryPlanned";
    /// Whether a job's head, at its last evaluation, costs no more on general text than `evaluation.maxGeneralLossIncrease` allows. For information: of
    /// several evaluations one that keeps to it is written.
    pub const GENERAL_TEXT_KEPT: &str = "GeneralTextKept";
    /// Whether a job's head is what `evaluation.thresholds` ask for, once it is written. One that is not is served by no `jobRef`.
    pub const PROMOTABLE: &str = "Promotable";
    /// A job is suspended by its spec.
    pub const SUSPENDED: &str = "Suspended";
}

/// What the statuses of the three kinds have in common.
pub trait ObservedStatus {
    /// The conditions.
    fn conditions(&self) -> &[Condition];
    /// Generation of the spec that the status speaks of.
    fn observed_generation(&self) -> Option<i64>;
}

macro_rules! observed_status {
    ($($status:ty),*) => {
        $(impl ObservedStatus for $status {
            fn conditions(&self) -> &[Condition] {
                &self.conditions
            }

            fn observed_generation(&self) -> Option<i64> {
                self.observed_generation
            }
        })*
    };
}
observed_status!(crate::BaseModelPoolStatus, crate::CarryOnJobStatus, crate::CarryOnDeploymentStatus);

/// What a status function says of one condition; the transition time is kept by [`set`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// Condition type, e.g. `Ready`.
    pub type_: &'static str,
    /// True or False.
    pub holds: bool,
    /// CamelCase reason, stable enough to alert on.
    pub reason: &'static str,
    /// One sentence that names the object at fault and what to do.
    pub message: String,
}

impl Verdict {
    /// A condition that holds.
    pub fn yes(type_: &'static str, reason: &'static str, message: impl Into<String>) -> Self {
        Self { type_, holds: true, reason, message: message.into() }
    }

    /// A condition that does not hold.
    pub fn no(type_: &'static str, reason: &'static str, message: impl Into<String>) -> Self {
        Self { type_, holds: false, reason, message: message.into() }
    }
}

/// Longest message, in characters; the API server takes 32 times as many.
const MESSAGE: usize = 1024;

/// Writes `verdicts` over `previous`: the transition time moves only when the status does; types not named are dropped.
pub fn set(previous: &[Condition], verdicts: &[Verdict], generation: Option<i64>, now: &Time) -> Vec<Condition> {
    let mut conditions: Vec<Condition> = verdicts
        .iter()
        .map(|verdict| {
            let status = if verdict.holds { "True" } else { "False" };
            let since = find(previous, verdict.type_).filter(|known| known.status == status);
            Condition {
                type_: verdict.type_.to_owned(),
                status: status.to_owned(),
                reason: verdict.reason.to_owned(),
                message: verdict.message.chars().take(MESSAGE).collect(),
                observed_generation: generation,
                last_transition_time: since.map_or_else(|| now.clone(), |since| since.last_transition_time.clone()),
            }
        })
        .collect();
    conditions.sort_by(|a, b| a.type_.cmp(&b.type_));
    conditions
}

/// The condition of this type.
pub fn find<'a>(conditions: &'a [Condition], type_: &str) -> Option<&'a Condition> {
    conditions.iter().find(|condition| condition.type_ == type_)
}

/// The condition of this type, when it is True.
pub fn holding<'a>(conditions: &'a [Condition], type_: &str) -> Option<&'a Condition> {
    find(conditions, type_).filter(|condition| condition.status == "True")
}

/// Whether `type_` is True.
pub fn is_true(conditions: &[Condition], type_: &str) -> bool {
    holding(conditions, type_).is_some()
}
