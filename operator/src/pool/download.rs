//! How far a pool's pods are with fetching their model, and what keeps them from it.

use carryon_crds::BaseModelPool;
use carryon_crds::common::ClaimPath;
use carryon_crds::pool::{CaBundle, DownloadStatus, KeyReference, ModelCache, ModelReference};
use carryon_crds::wire::{FetchFailure, FetchReport};
use k8s_openapi::api::core::v1::{ContainerStatus, Pod, PodTemplateSpec};
use kube::ResourceExt as _;

use super::Observed;
use crate::shared::meta;
use crate::shared::rollout::is_earlier;
use crate::shared::said::Said as _;
use crate::shared::trouble::{Trouble, end};
use crate::shared::worker::{fetch_status, fetches};

/// The commit that a hub's revision was resolved to: kept by the status, else what the first pod says of it.
pub fn commit(pool: &BaseModelPool, observed: &Observed) -> Option<String> {
    let kept = pool.status.as_ref().and_then(|status| status.download.as_ref()?.revision.clone());
    kept.or_else(|| said(observed).into_iter().find_map(|(_, report)| report.commit))
}

/// How far the pod is that is furthest behind; what was said before stands while nobody says anything.
pub fn download(pool: &BaseModelPool, observed: &Observed) -> Option<DownloadStatus> {
    if !pool.spec.model.is_fetched() {
        return None;
    }
    let known = said(observed).into_iter().map(|(_, report)| report).filter(|report| report.total > 0);
    let behind = known.max_by_key(|report| report.total.saturating_sub(report.bytes));
    let previous = pool.status.as_ref().and_then(|status| status.download.clone());
    let revision = commit(pool, observed);
    let Some(report) = behind else {
        return previous.or_else(|| revision.map(|revision| DownloadStatus { revision: Some(revision), ..DownloadStatus::default() }));
    };
    let progress = Some(words(&report));
    Some(DownloadStatus { revision, progress, bytes: report.bytes, total_bytes: report.total, eta_seconds: report.eta_seconds })
}

/// `35 %, 21.4 GB of 61.1 GB, 7 min left`.
fn words(report: &FetchReport) -> String {
    let share = u128::from(report.bytes.min(report.total)) * 100 / u128::from(report.total.max(1));
    let left = report.eta_seconds.filter(|_| report.bytes < report.total).map(|seconds| match seconds {
        0..100 => format!(", {seconds} s left"),
        100..6000 => format!(", {} min left", seconds.div_ceil(60)),
        _ => format!(", {} h left", seconds.div_ceil(3600)),
    });
    format!("{share} %, {} of {}{}", size(report.bytes), size(report.total), left.unwrap_or_default())
}

/// Bytes with three figures, in powers of ten as disks and networks are sold.
fn size(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "kB", "MB", "GB", "TB"];
    let (mut figure, mut unit) = (bytes as f64, 0);
    while figure >= 999.5 && unit + 1 < UNITS.len() {
        (figure, unit) = (figure / 1000.0, unit + 1);
    }
    let digits = if unit == 0 || figure >= 99.95 { 0 } else { 1 };
    format!("{figure:.digits$} {}", UNITS[unit])
}

/// What pods say of their fetches, those that have ended with their last words, by name.
fn said(observed: &Observed) -> Vec<(String, FetchReport)> {
    let mut pods: Vec<&Pod> = observed.pods.iter().filter(|pod| pod.metadata.deletion_timestamp.is_none()).collect();
    pods.sort_by_key(|pod| pod.name_any());
    let report = |pod: &&Pod| {
        let name = pod.name_any();
        let running = || observed.fetches.get(&name).filter(|_| fetches(pod)).cloned();
        Some((name.clone(), running().or_else(|| last_words(fetch_status(pod)?))?))
    };
    pods.iter().filter_map(report).collect()
}

fn last_words(status: &ContainerStatus) -> Option<FetchReport> {
    serde_json::from_str::<FetchReport>(end(status)?.message.as_deref()?).ok().map(FetchReport::fit)
}

/// What keeps pods of the present template: that they fetch their model, or why they cannot. One that waiting does not cure is told first.
pub fn trouble(pool: &BaseModelPool, observed: &Observed, template: Option<&PodTemplateSpec>) -> Option<Trouble> {
    let mut pods: Vec<&Pod> = observed.pods.iter().filter(|pod| pod.metadata.deletion_timestamp.is_none()).collect();
    pods.retain(|pod| !is_earlier(pod, template));
    pods.sort_by_key(|pod| pod.name_any());
    let mut troubles: Vec<Trouble> = pods.iter().filter_map(|pod| of(pool, pod, observed)).collect();
    let rank = |trouble: &Trouble| (!trouble.permanent, trouble.reason == FETCHING);
    // The first of the worst: it is the same one as long as nothing changes.
    let worst = (0..troubles.len()).min_by_key(|&index| rank(&troubles[index]))?;
    let others = troubles.iter().filter(|trouble| trouble.reason == FETCHING).count() - usize::from(troubles[worst].reason == FETCHING);
    let mut trouble = troubles.swap_remove(worst);
    if trouble.reason == FETCHING && others > 0 {
        trouble.message += &format!("; {others} more fetch it too");
    }
    Some(trouble)
}

/// Reason of a pool whose pods fetch.
const FETCHING: &str = "ModelFetching";

fn of(pool: &BaseModelPool, pod: &Pod, observed: &Observed) -> Option<Trouble> {
    let (status, name) = (fetch_status(pod)?, pod.name_any());
    let state = status.state.as_ref()?;
    if let Some(waiting) = state.waiting.as_ref().filter(|waiting| waiting.reason.as_deref() == Some("CreateContainerConfigError")) {
        return secret(pool, waiting.message.as_deref().unwrap_or_default());
    }
    let failed = || end(status).filter(|end| end.exit_code != 0).and(last_words(status)).and_then(|report| failure(pool, pod, &report));
    if state.running.is_none() {
        // One that has succeeded has no trouble; one that has not run yet has none of its own.
        return if state.terminated.as_ref().is_some_and(|end| end.exit_code == 0) { None } else { failed() };
    }
    let fetching = |words: &str| Trouble { reason: FETCHING, message: format!("pod {name} fetches its model{words}"), permanent: false };
    let report = observed.fetches.get(&name);
    match report.map_or("", |report| &report.state) {
        // How far it is stands elsewhere in the status: here it would be news every few seconds.
        "fetching" | "complete" => Some(fetching("")),
        "waiting" | "retrying" => report.map(|report| fetching(&format!(": {}", report.message))),
        // It only begins: what it failed of before stands until a byte has come.
        _ => failed().or_else(|| Some(fetching(""))),
    }
}

/// A failure in the words of the pod that met it, with what to do about it.
fn failure(pool: &BaseModelPool, pod: &Pod, report: &FetchReport) -> Option<Trouble> {
    use FetchFailure::*;
    let (model, failure) = (&pool.spec.model, report.failure?);
    if failure == CaBundle {
        return Some(authorities(pool, model.ca_bundle.as_ref()?, &report.message));
    }
    let (reason, permanent, advice) = match failure {
        AccessDenied => ("ModelAccessDenied", true, credentials(model)),
        NotFound => ("ModelNotFound", true, "create a pool with the right spec.model.source, or put it there".to_owned()),
        Unreachable => {
            let advice = "it is asked again; see that pods of this namespace may connect to it (HTTPS_PROXY goes into spec.server.env)";
            ("ModelSourceUnreachable", false, advice.to_owned())
        }
        Untrusted => ("ModelSourceUntrusted", true, "name its authority in spec.model.caBundle of a new pool".to_owned()),
        VolumeFull => ("ModelVolumeFull", true, room(model.cache.as_ref(), pod)),
        VolumeReadOnly => ("ModelVolumeReadOnly", true, "let the pods' user (their runAsUser) write there".to_owned()),
        Damaged => ("ModelDamaged", false, "it is fetched again".to_owned()),
        Unsupported => ("ModelUnsupported", true, "nothing but its configuration was fetched: name another model in a new pool".to_owned()),
        CaBundle | Other => ("ModelFetchFailed", false, "it is tried again".to_owned()),
    };
    let message = format!("pod {} cannot fetch its model: {}; {advice}", pod.name_any(), report.message);
    Some(Trouble { reason, message, permanent })
}

fn credentials(model: &ModelReference) -> String {
    let hub = model.source.hugging_face.as_ref().map(|hub| hub.token_secret_ref.as_ref());
    let store = model.source.object_store.as_ref().and_then(|store| store.secret_ref.as_ref());
    match (hub, store) {
        (Some(Some(secret)), _) => format!("the token is key {:?} of Secret {:?}: it is read anew each time", secret.key, secret.name),
        (Some(None), _) => "create a pool with spec.model.source.huggingFace.tokenSecretRef".to_owned(),
        (None, Some(secret)) => format!("the credentials are those of Secret {:?}: they are read anew each time", secret.name),
        (None, None) => "create a pool with spec.model.source.objectStore.secretRef, or give its service account access".to_owned(),
    }
}

fn room(cache: Option<&ModelCache>, pod: &Pod) -> String {
    let node = pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref()).unwrap_or("its node");
    match cache {
        Some(ModelCache { persistent_volume_claim: Some(ClaimPath { claim_name, .. }), .. }) => {
            format!("make PersistentVolumeClaim {claim_name:?} larger, or remove what nobody needs from it")
        }
        Some(ModelCache { host_path: Some(folder), .. }) => format!("make room in {} of {node}", folder.path),
        _ => format!("make room on the disk of {node}, or create a pool with spec.model.cache"),
    }
}

fn authorities(pool: &BaseModelPool, bundle: &CaBundle, words: &str) -> Trouble {
    let (reason, kind, key) = match (&bundle.config_map_key_ref, &bundle.secret_key_ref) {
        (Some(key), _) => ("ConfigMapNotFound", "ConfigMap", Some(key)),
        (None, key) => ("SecretKeyNotFound", "Secret", key.as_ref()),
    };
    let (name, key) = key.map_or(("", ""), |KeyReference { name, key }| (name, key));
    let space = meta::namespace(pool);
    let message = format!("{kind} {space}/{name} (spec.model.caBundle) or its key {key:?} not found, or it holds no certificate: {words}");
    Trouble { reason, message, permanent: false }
}

/// A Secret that the kubelet does not find, if it is one that the model's source names.
fn secret(pool: &BaseModelPool, words: &str) -> Option<Trouble> {
    let source = &pool.spec.model.source;
    let token = source.hugging_face.as_ref().and_then(|hub| hub.token_secret_ref.as_ref());
    let token = token.map(|secret| (&secret.name, format!(" or its key {:?}", secret.key), "huggingFace.tokenSecretRef"));
    let keys = || Some((&source.object_store.as_ref()?.secret_ref.as_ref()?.name, String::new(), "objectStore.secretRef"));
    let (name, key, field) = token.or_else(keys)?;
    let named = words.contains(&format!("{name:?}")) || words.contains(&format!("/{name}"));
    let space = meta::namespace(pool);
    let message = format!("Secret {space}/{name} (spec.model.source.{field}){key} not found: create it");
    named.then_some(Trouble { reason: "SecretKeyNotFound", message, permanent: false })
}
