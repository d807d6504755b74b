//! A job's pods: whose they are, whether they may still write to the output folder, how long they ran, and which ends are
//! of no more use to anybody.

use carryon_crds::job::AttemptStatus;
use carryon_crds::wire::ExitCode;
use carryon_crds::{CarryOnJob, names};
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::ResourceExt as _;

use super::Observed;
use super::attempts::seconds;
use crate::shared::trouble::{self, last_end, phase};
use crate::shared::worker;

/// Where the Job controller writes the UID of a pod's batch Job. It outlives the owner reference, which an orphaning deletion takes away.
const CONTROLLER_UID: &str = "batch.kubernetes.io/controller-uid";

/// How long a container beside the trainer may outlive it: those that Kubernetes ends by itself need a moment.
const OUTLIVES_SECONDS: i64 = 30;

/// Whether `pod` belongs to the batch Job with this UID.
pub fn is_of(pod: &Pod, job: Option<&String>) -> bool {
    job.is_some_and(|uid| pod.labels().get(CONTROLLER_UID) == Some(uid) || pod.owner_references().iter().any(|owner| owner.uid == *uid))
}

/// Whether a pod may still write: its trainer has not ended, and is not gone without a word.
pub fn lives(pod: &Pod) -> bool {
    !["Succeeded", "Failed"].contains(&phase(pod)) && !has_ended(pod) && !is_gone(pod)
}

/// Whether the trainer's container has ended. It is not started again; a container beside it may go on.
fn has_ended(pod: &Pod) -> bool {
    worker::status(pod).and_then(|status| status.state.as_ref()).is_some_and(|state| state.terminated.is_some())
}

/// Whether a container beside the trainer, which has ended, keeps the pod, so that its batch Job does not hear of the end. While somebody else
/// ends the pod, as a queue does that takes its place away, it is for the batch Job to say what comes next.
pub fn is_outlived(pod: &Pod) -> bool {
    phase(pod) == "Running" && has_ended(pod) && pod.metadata.deletion_timestamp.is_none() && !trouble::is_disrupted(pod)
}

/// Attempts whose ends are in the stored status and whose pods are kept by a container beside the trainer, each with the seconds that it has left.
pub fn outlived<'a>(job: &'a CarryOnJob, pods: &'a [Pod], now: &'a Time) -> impl Iterator<Item = (&'a AttemptStatus, i64)> {
    let ended = job.status.iter().flat_map(|status| &status.attempts).filter(|attempt| attempt.result.is_some());
    ended.filter_map(move |attempt| {
        let pod = pods.iter().find(|pod| is_of(pod, attempt.uid.as_ref()) && is_outlived(pod))?;
        let since = last_end(pod).and_then(|end| end.finished_at.as_ref()).map_or(OUTLIVES_SECONDS, |end| seconds(end, now));
        Some((attempt, (OUTLIVES_SECONDS - since).max(0)))
    })
}

/// A pod that nobody waits for: deleted before it had a node, or by force while its node does not answer.
fn is_gone(pod: &Pod) -> bool {
    let at_once = pod.metadata.deletion_timestamp.is_some() && pod.metadata.deletion_grace_period_seconds == Some(0);
    let node = pod.spec.as_ref().and_then(|spec| spec.node_name.as_ref());
    at_once && (node.is_none() || trouble::lost(pod).is_some())
}

/// Whether somebody asked for the pod's deletion before it ended by itself.
pub fn was_stopped(pod: &Pod) -> bool {
    let Some(deadline) = &pod.metadata.deletion_timestamp else { return false };
    let asked = deadline.0.as_second() - pod.metadata.deletion_grace_period_seconds.unwrap_or(0);
    let ended = last_end(pod).and_then(|end| end.finished_at.as_ref());
    ended.is_none_or(|ended| asked <= ended.0.as_second())
}

/// The pod that keeps the next attempt from its start, when there is one: never two trainers on one output folder.
pub fn occupant<'a>(pods: impl IntoIterator<Item = &'a Pod>) -> Option<(&'static str, String)> {
    let pod = pods.into_iter().filter(|pod| lives(pod)).min_by_key(|pod| pod.name_any())?;
    if let Some(lost) = trouble::lost(pod) {
        return Some((lost.reason, format!("{}; the next attempt starts when it has gone", lost.message)));
    }
    let attempt = pod.labels().get(names::ATTEMPT_LABEL).map(|number| format!(" of attempt {number}")).unwrap_or_default();
    let node = pod.spec.as_ref().and_then(|spec| spec.node_name.as_ref()).map(|node| format!(" on node {node}")).unwrap_or_default();
    let name = pod.name_any();
    Some(("OutputInUse", format!("pod {name}{attempt}{node} has the output folder still; the next attempt starts when it has ended")))
}

/// From when to when an attempt's pods ran, in order; to none for the one that runs. Waiting in a queue or for a node does not count.
pub fn runs(observed: &Observed, attempt: &AttemptStatus, now: &Time) -> Vec<(Time, Option<Time>)> {
    let mut runs: Vec<_> = match observed.attempt.as_ref().filter(|job| super::end::manager(job).is_some()) {
        // Its pods are in another cluster.
        Some(job) => job.status.iter().filter_map(|status| Some((status.start_time.clone()?, super::end::ended_at(job)))).collect(),
        None => observed.pods_of(attempt).filter_map(|pod| run(pod, now)).collect(),
    };
    runs.sort();
    runs
}

fn run(pod: &Pod, now: &Time) -> Option<(Time, Option<Time>)> {
    let state = worker::status(pod)?.state.as_ref()?;
    if let Some(end) = &state.terminated {
        return Some((end.started_at.clone()?, Some(end.finished_at.clone().unwrap_or_else(|| now.clone()))));
    }
    let start = state.running.as_ref()?.started_at.clone()?;
    // What is gone without a word ran until it was deleted at the latest.
    let end = (!lives(pod)).then(|| pod.metadata.deletion_timestamp.clone().unwrap_or_else(|| now.clone()));
    Some((start, end))
}

/// Pods that are held although all there is to know of them is in the job's stored status.
pub fn recorded<'a>(job: &'a CarryOnJob, pods: &'a [Pod], now: &'a Time) -> impl Iterator<Item = &'a Pod> {
    let status = job.status.as_ref();
    let attempts = status.map_or(&[][..], |status| &status.attempts);
    let counted = status.and_then(|status| status.active_until.as_ref());
    pods.iter().filter(|pod| is_held(pod)).filter(move |pod| match attempts.iter().find(|attempt| is_of(pod, attempt.uid.as_ref())) {
        Some(attempt) if attempt.result.is_some() => true,
        Some(_) if is_ignored(pod) => {
            let end = run(pod, now).and_then(|(_, end)| end);
            end.is_none_or(|end| counted.is_some_and(|until| seconds(until, &end) == 0))
        }
        Some(_) => false,
        // Of an earlier job of that name.
        None => pod.metadata.deletion_timestamp.is_some() && !lives(pod),
    })
}

/// Whether the pod stays until we have read its end.
pub fn is_held(pod: &Pod) -> bool {
    pod.finalizers().iter().any(|finalizer| finalizer == names::LAST_WORDS_FINALIZER)
}

/// Whether the pod shows an end that ends its attempt too.
pub fn is_final(pod: &Pod) -> bool {
    last_end(pod).is_some() && !is_ignored(pod)
}

/// An end after which the batch Job goes on with another pod, by its pod failure policy, or one that says nothing.
fn is_ignored(pod: &Pod) -> bool {
    let ended = match last_end(pod).map(|end| end.exit_code) {
        Some(code) if code == ExitCode::Complete as i32 => false,
        Some(code) => code == ExitCode::Resume as i32 || trouble::is_disrupted(pod),
        None => true,
    };
    ended && !lives(pod)
}
