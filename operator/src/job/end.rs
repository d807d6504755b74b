//! How the attempt that runs has ended, by its pods and its batch Job.

use carryon_crds::job::{AttemptResult, AttemptStatus};
use carryon_crds::wire::{ExitCode, TerminationMessage};
use k8s_openapi::api::batch::v1::{Job, JobCondition};
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use super::Observed;
use super::trainers::{is_final, is_outlived, lives, was_stopped};
use crate::shared::said::Said as _;
use crate::shared::text::{WORDS, bounded};
use crate::shared::trouble::{last_end, last_line};

/// The end of an attempt.
pub struct End {
    /// What it means.
    pub result: AttemptResult,
    /// The trainer's exit code, when it is known.
    pub exit_code: Option<i32>,
    /// When, when that is known.
    pub at: Option<Time>,
    /// Last words, for people.
    pub message: Option<String>,
    /// Last words, for us.
    pub words: Option<TerminationMessage>,
}

/// How `attempt` ended; none while it runs, and while a pod of a batch Job that was deleted still writes its checkpoint.
pub fn end(attempt: &AttemptStatus, observed: &Observed) -> Option<End> {
    let job = observed.attempt.as_ref();
    let leaves = job.is_none_or(|job| job.metadata.deletion_timestamp.is_some());
    let pods: Vec<&Pod> = observed.pods_of(attempt).collect();
    let stays = !leaves || pods.iter().any(|pod| lives(pod));
    if stays && !job.is_some_and(has_ended) && !pods.iter().any(|pod| is_outlived(pod)) {
        return None;
    }
    // Of the same second, the one that the batch Job does not go on from.
    let last = pods.iter().filter(|pod| last_end(pod).is_some()).max_by_key(|pod| (finished(pod), is_final(pod)));
    let terminated = last.and_then(|pod| last_end(pod));
    let said = terminated.and_then(|end| end.message.as_deref());
    let words = said.and_then(|text| serde_json::from_str::<TerminationMessage>(text).ok()).map(TerminationMessage::fit);
    let told = || job.and_then(|job| told_exit_code(job).or(condition(job, "Complete").map(|_| ExitCode::Complete as i32)));
    let exit_code = terminated.map(|end| end.exit_code).or_else(told);
    let elsewhere = terminated.is_none() && job.is_some_and(|job| manager(job).is_some());
    let mut message = words.as_ref().map(|words| words.message.clone()).or_else(|| said.map(|text| bounded(last_line(text), WORDS)));
    let result = match exit_code {
        Some(code) if code == ExitCode::Complete as i32 => {
            if elsewhere || words.as_ref().is_some_and(|words| words.digest.is_some()) {
                AttemptResult::Complete
            } else {
                message = Some("the trainer ended without naming the head it wrote".to_owned());
                AttemptResult::Failed
            }
        }
        Some(code) if code == ExitCode::Resume as i32 => AttemptResult::Resumable,
        Some(code) if code == ExitCode::Data as i32 || code == ExitCode::Configuration as i32 => AttemptResult::Refused,
        // Somebody deleted the batch Job, and the pod with it: no failure of the trainer's.
        _ if !job.is_some_and(has_ended) && last.is_none_or(|pod| was_stopped(pod)) => AttemptResult::Stopped,
        _ => AttemptResult::Failed,
    };
    let at = terminated.and_then(|end| end.finished_at.clone()).or_else(|| job.and_then(ended_at).filter(|_| elsewhere));
    Some(End { result, exit_code, at, message: message.filter(|message| !message.is_empty()), words })
}

fn finished(pod: &Pod) -> Option<&Time> {
    last_end(pod)?.finished_at.as_ref()
}

/// Whether the batch Job of an attempt has ended.
pub fn has_ended(job: &Job) -> bool {
    condition(job, "Complete").is_some() || condition(job, "Failed").is_some()
}

/// When it ended.
pub fn ended_at(job: &Job) -> Option<Time> {
    condition(job, "Complete").or_else(|| condition(job, "Failed")).and_then(|condition| condition.last_transition_time.clone())
}

/// Who looks after a batch Job in place of this cluster's Job controller, such as `kueue.x-k8s.io/multikueue`. Its pods are elsewhere, and its
/// status is all that is known of it here.
pub fn manager(job: &Job) -> Option<&str> {
    job.spec.as_ref()?.managed_by.as_deref().filter(|manager| *manager != "kubernetes.io/job-controller")
}

/// The exit code in the words of the Failed condition that the attempt's pod failure policy leads to:
/// "Container trainer for pod ns/name failed with exit code 65 matching FailJob rule at index 2".
fn told_exit_code(job: &Job) -> Option<i32> {
    let (_, after) = condition(job, "Failed")?.message.as_ref()?.split_once(" failed with exit code ")?;
    after.split(' ').next()?.parse().ok()
}

fn condition<'a>(job: &'a Job, type_: &str) -> Option<&'a JobCondition> {
    let conditions = job.status.as_ref()?.conditions.as_ref()?;
    conditions.iter().find(|condition| condition.type_ == type_ && condition.status == "True")
}
