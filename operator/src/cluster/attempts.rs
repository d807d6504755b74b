//! A job's attempts in the cluster: their batch Jobs and pods, who is in the output folder, and what is held until it is written down.

use carryon_crds::job::AttemptStatus;
use carryon_crds::{CarryOnJob, names};
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{ListParams, Patch, PatchParams};
use kube::{Api, Resource, ResourceExt as _};
use serde_json::json;

use super::context::Context;
use super::failure::{Failure, code, path};
use super::ownership::controller;
use crate::job;
use crate::job::record::Record;
use crate::job::trainers::{is_final, is_of, lives, occupant};
use crate::shared::Refusal;
use crate::shared::meta;

/// Component label of a trainer.
pub const TRAINER: &str = "trainer";

/// Whether a pod or a batch Job is of a CarryOnJob of this name, be it the present one or one before it.
pub fn is_of_job<K: Resource>(object: &K, namespace: &str, name: &str) -> bool {
    let labels = object.labels();
    object.namespace().as_deref() == Some(namespace)
        && names::selector(TRAINER, name).iter().all(|(key, value)| labels.get(key) == Some(value))
}

/// Whether a batch Job belongs to this very CarryOnJob.
pub fn is_owned(attempt: &Job, job: &CarryOnJob) -> bool {
    attempt.owner_references().iter().any(|owner| Some(&owner.uid) == job.uid().as_ref())
}

/// The attempt that runs by the status.
fn running(job: &CarryOnJob) -> Option<&AttemptStatus> {
    job.status.as_ref()?.attempts.last().filter(|attempt| attempt.result.is_none())
}

/// The batch Job of the attempt that runs, else of the next one, should it have been made and not written down. A cache that has not seen the
/// former yet would make it look deleted, so the API server is asked.
pub async fn present(job: &CarryOnJob, namespace: &str, context: &Context) -> Result<Option<Job>, Failure> {
    let running = running(job);
    let last = job.status.as_ref().and_then(|status| status.attempts.last()).map_or(0, |last| last.number);
    let name = names::attempt(&job.name_any(), running.map_or(last + 1, |running| running.number));
    let ours = |attempt: &Job| match running.and_then(|running| running.uid.as_ref()) {
        Some(uid) => attempt.uid().as_ref() == Some(uid),
        // One without an owner was left behind, and is taken over.
        None => is_owned(attempt, job) || controller(attempt).is_none(),
    };
    if let Some(seen) = context.stores.attempts.get(namespace, &name).filter(ours) {
        return Ok(Some(seen));
    }
    if running.is_none() {
        return Ok(None);
    }
    let found = Api::<Job>::namespaced(context.client.clone(), namespace).get_opt(&name).await;
    found.map(|found| found.filter(ours)).map_err(Failure::of("read", format!("Job {namespace}/{name}")))
}

/// All trainers of a job of this name. How an attempt ended must not be judged by a cache that has not seen the end yet.
pub async fn pods(job: &CarryOnJob, attempt: Option<&Job>, context: &Context) -> Result<Vec<Pod>, Failure> {
    let seen = context.stores.pods.owned_by(&meta::namespace(job), TRAINER, &job.name_any());
    let Some(running) = running(job) else { return Ok(seen) };
    let of_attempt = || seen.iter().filter(|pod| is_of(pod, running.uid.as_ref()));
    let leaves = attempt.is_none_or(|attempt| attempt.metadata.deletion_timestamp.is_some());
    let over = attempt.is_some_and(job::has_ended) || (leaves && !of_attempt().any(lives));
    if over && !of_attempt().any(is_final) { trainers(&meta::namespace(job), &job.name_any(), context).await } else { Ok(seen) }
}

/// The same by the API server's word.
async fn trainers(namespace: &str, name: &str, context: &Context) -> Result<Vec<Pod>, Failure> {
    let labels = names::selector(TRAINER, name).iter().map(|(key, value)| format!("{key}={value}")).collect::<Vec<_>>().join(",");
    let list = Api::<Pod>::namespaced(context.client.clone(), namespace).list(&ListParams::default().labels(&labels)).await;
    list.map(|list| list.items).map_err(Failure::of("read", format!("pods of CarryOnJob {namespace}/{name}")))
}

/// Before a trainer is let into the output folder, the API server is asked who is there: a cache may be behind.
pub async fn is_free(job: &CarryOnJob, wanted: &Job, context: &Context) -> Result<(), Failure> {
    let (namespace, name) = (meta::namespace(job), job.name_any());
    if let Some((reason, message)) = occupant(&trainers(&namespace, &name, context).await?) {
        return Err(Refusal::waiting(reason, message).into());
    }
    // One that a queue holds back has no pod, and may have one at any moment.
    let may_start = |other: &Job| other.metadata.deletion_timestamp.is_none() && !job::has_ended(other);
    let others = |other: &Job| is_of_job(other, &namespace, &name) && other.name_any() != wanted.name_any() && may_start(other);
    match context.stores.attempts.list(others).first() {
        Some(other) => {
            let message =
                format!("Job {namespace}/{} may yet write to the output folder: delete it, or wait for its end", other.name_any());
            Err(Refusal::waiting("OutputInUse", message).into())
        }
        None => Ok(()),
    }
}

/// Lets pods go whose end nobody has to read any more.
pub async fn let_go(pods: impl Iterator<Item = &Pod>, context: &Context) -> Result<(), Failure> {
    for pod in pods {
        let namespace = meta::namespace(pod);
        let patch = json!({ "metadata": { "uid": pod.uid(), "$deleteFromPrimitiveList/finalizers": [names::LAST_WORDS_FINALIZER] } });
        let api = Api::<Pod>::namespaced(context.client.clone(), &namespace);
        match api.patch_metadata(&pod.name_any(), &PatchParams::default(), &Patch::Strategic(patch)).await {
            Err(error) if ![404, 409].contains(&code(&error)) => return Err(Failure::of("let go of", path(pod))(error)),
            _ => {}
        }
    }
    Ok(())
}

/// Deletes the batch Job of an attempt that has ended, with the pod that something beside the trainer keeps on its node.
pub async fn free(job: &CarryOnJob, attempt: &AttemptStatus, context: &Context) -> Result<(), Failure> {
    let (namespace, name) = (meta::namespace(job), names::attempt(&job.name_any(), attempt.number));
    let is_kept = |found: &Job| found.uid() == attempt.uid && found.metadata.deletion_timestamp.is_none();
    match context.stores.attempts.get(&namespace, &name).filter(is_kept) {
        Some(kept) => context.applier.of(job).delete(&kept).await,
        None => Ok(()),
    }
}

/// Writes a finished job's result into its metadata; false when that is refused: then its status has to do.
pub async fn tell(job: &CarryOnJob, record: &Record, context: &Context) -> Result<bool, Failure> {
    let (namespace, name) = (meta::namespace(job), job.name_any());
    let text = serde_json::to_string(record).expect("a record is JSON");
    let patch = json!({ "metadata": { "uid": job.uid(), "annotations": { names::RESULT_ANNOTATION: text } } });
    let api = Api::<CarryOnJob>::namespaced(context.client.clone(), &namespace);
    match api.patch_metadata(&name, &PatchParams::default(), &Patch::Merge(patch)).await {
        Ok(_) => Ok(true),
        Err(error) if [400, 403, 422].contains(&code(&error)) => {
            tracing::warn!("CarryOnJob {namespace}/{name}: its result is not in its metadata, and a backup will not have it: {error}");
            Ok(false)
        }
        Err(error) if [404, 409].contains(&code(&error)) => Err(Failure::Deleted),
        Err(error) => Err(Failure::of("annotate", path(job))(error)),
    }
}
