//! The workload controllers: StatefulSets, Deployments and Jobs of the store become pods, and get the statuses that
//! Kubernetes' own controllers would write.

use std::io;

use carryon_crds::wire;
use k8s_openapi::api::apps::v1::{Deployment, DeploymentStatus, StatefulSet, StatefulSetStatus};
use k8s_openapi::api::batch::v1::{Job, JobCondition, JobStatus, PodFailurePolicyRule};
use k8s_openapi::api::core::v1::{Pod, PodTemplateSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::ResourceExt as _;
use serde_json::json;

use super::store::{Object, Store};
use crate::job::trainers::is_held;
use crate::shared::meta::namespace;
use crate::shared::trouble::{is_ready, last_end, phase};

/// Label with the digest of the template a pod was made from.
const REVISION_LABEL: &str = "controller-revision-hash";

/// One round over all workloads.
pub fn tick(store: &mut Store, now: &Time) -> io::Result<()> {
    for set in store.list::<StatefulSet>() {
        stateful_set(store, set, now)?;
    }
    for deployment in store.list::<Deployment>() {
        self::deployment(store, deployment, now)?;
    }
    for job in store.list::<Job>() {
        self::job(store, job, now)?;
    }
    Ok(())
}

/// Marks an object as deleted, once; what runs for it ends with its grace period.
pub fn delete<K: Object>(store: &mut Store, mut object: K, now: &Time) -> io::Result<()> {
    if object.meta().deletion_timestamp.is_none() {
        object.meta_mut().deletion_timestamp = Some(now.clone());
        store.put(&object)?;
    }
    Ok(())
}

/// The pods that belong to `owner`, in the order of their names.
pub fn pods_of<K: Object>(store: &Store, owner: &K) -> Vec<Pod> {
    let uid = owner.uid();
    let owned = |pod: &Pod| pod.owner_references().iter().any(|reference| Some(&reference.uid) == uid.as_ref());
    store.list::<Pod>().into_iter().filter(owned).collect()
}

struct Counts {
    pods: i32,
    ready: i32,
    updated: i32,
}

fn stateful_set(store: &mut Store, mut set: StatefulSet, now: &Time) -> io::Result<()> {
    let Some(spec) = set.spec.clone() else { return Ok(()) };
    let counts = replicas(store, &set, spec.replicas.unwrap_or(1), &spec.template, now)?;
    set.status = Some(StatefulSetStatus {
        replicas: counts.pods,
        ready_replicas: Some(counts.ready),
        available_replicas: Some(counts.ready),
        current_replicas: Some(counts.pods),
        updated_replicas: Some(counts.updated),
        observed_generation: set.metadata.generation,
        ..StatefulSetStatus::default()
    });
    store.put(&set)
}

fn deployment(store: &mut Store, mut deployment: Deployment, now: &Time) -> io::Result<()> {
    let Some(spec) = deployment.spec.clone() else { return Ok(()) };
    let wanted = spec.replicas.unwrap_or(1);
    let counts = replicas(store, &deployment, wanted, &spec.template, now)?;
    deployment.status = Some(DeploymentStatus {
        replicas: Some(counts.pods),
        ready_replicas: Some(counts.ready),
        available_replicas: Some(counts.ready),
        unavailable_replicas: Some((wanted - counts.ready).max(0)),
        updated_replicas: Some(counts.updated),
        observed_generation: deployment.metadata.generation,
        ..DeploymentStatus::default()
    });
    store.put(&deployment)
}

/// Pods `NAME-0` … of the present template. One that was made from another template is replaced in place: two pods of one
/// name, one port and one share of this machine's memory would be in each other's way.
fn replicas<K: Object>(store: &mut Store, owner: &K, wanted: i32, template: &PodTemplateSpec, now: &Time) -> io::Result<Counts> {
    let revision = revision(template);
    let names: Vec<String> = (0..wanted).map(|index| format!("{}-{index}", owner.name_any())).collect();
    let pods = pods_of(store, owner);
    let is_current = |pod: &Pod| pod.labels().get(REVISION_LABEL) == Some(&revision);
    for pod in &pods {
        if !names.contains(&pod.name_any()) || !is_current(pod) {
            delete(store, pod.clone(), now)?;
        }
    }
    for name in names.iter().filter(|name| pods.iter().all(|pod| pod.name_any() != **name)) {
        create_pod(store, owner, name, template, &revision, now)?;
    }
    let count = |keep: &dyn Fn(&Pod) -> bool| i32::try_from(pods.iter().filter(|pod| keep(pod)).count()).unwrap_or(i32::MAX);
    let ready = count(&|pod| is_ready(pod) && pod.metadata.deletion_timestamp.is_none());
    Ok(Counts { pods: count(&|_| true), ready, updated: count(&is_current) })
}

fn job(store: &mut Store, mut job: Job, now: &Time) -> io::Result<()> {
    let pods = pods_of(store, &job);
    if job.metadata.deletion_timestamp.is_some() {
        if pods.is_empty() {
            store.remove::<Job>(&namespace(&job), &job.name_any())?;
        }
        return pods.into_iter().try_for_each(|pod| delete(store, pod, now));
    }
    if job.status.as_ref().is_some_and(|status| status.completion_time.is_some() || status.failed.unwrap_or(0) > 0) {
        return Ok(());
    }
    let Some(template) = job.spec.as_ref().map(|spec| spec.template.clone()) else { return Ok(()) };
    let finished = pods.iter().find(|pod| ["Succeeded", "Failed"].contains(&phase(pod)));
    let mut status = job.status.clone().unwrap_or_default();
    status.start_time.get_or_insert_with(|| now.clone());
    match finished {
        Some(pod) if phase(pod) == "Succeeded" => finish(&mut status, "Complete", now),
        // The next one has its name. It waits until somebody has read this one's end.
        Some(pod) if is_ignored(&job, pod) => {
            if !is_held(pod) {
                delete(store, pod.clone(), now)?;
            }
        }
        Some(_) => finish(&mut status, "Failed", now),
        None if pods.is_empty() => create_pod(store, &job, &format!("{}-0", job.name_any()), &template, &revision(&template), now)?,
        None => status.active = Some(1),
    }
    job.status = Some(status);
    store.put(&job)
}

/// Whether another pod takes the place of one that has failed, by its Job's pod failure policy.
fn is_ignored(job: &Job, pod: &Pod) -> bool {
    let rules = job.spec.iter().filter_map(|spec| spec.pod_failure_policy.as_ref()).flat_map(|policy| &policy.rules);
    let Some(code) = last_end(pod).map(|end| end.exit_code) else { return false };
    let applies =
        |rule: &&PodFailurePolicyRule| rule.on_exit_codes.as_ref().is_some_and(|on| on.values.contains(&code) == (on.operator == "In"));
    rules.into_iter().find(applies).is_some_and(|rule| rule.action == "Ignore")
}

fn finish(status: &mut JobStatus, type_: &str, now: &Time) {
    status.active = None;
    if type_ == "Complete" {
        status.succeeded = Some(1);
        status.completion_time = Some(now.clone());
    } else {
        status.failed = Some(1);
    }
    let condition = JobCondition {
        type_: type_.to_owned(),
        status: "True".to_owned(),
        last_transition_time: Some(now.clone()),
        ..JobCondition::default()
    };
    status.conditions.get_or_insert_default().push(condition);
}

fn revision(template: &PodTemplateSpec) -> String {
    let digest = wire::digest(json!(template).to_string().as_bytes());
    digest.trim_start_matches("sha256:").chars().take(10).collect()
}

fn create_pod<K: Object>(
    store: &mut Store,
    owner: &K,
    name: &str,
    template: &PodTemplateSpec,
    revision: &str,
    now: &Time,
) -> io::Result<()> {
    let mut metadata = template.metadata.clone().unwrap_or_default();
    metadata.name = Some(name.to_owned());
    metadata.namespace = Some(namespace(owner));
    metadata.owner_references = owner.controller_owner_ref(&()).map(|owner| vec![owner]);
    metadata.labels.get_or_insert_default().insert(REVISION_LABEL.to_owned(), revision.to_owned());
    store.apply(&Pod { metadata, spec: template.spec.clone(), status: None }, now).map(|_| ())
}
