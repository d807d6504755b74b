//! What a pool says while its pods fetch their model, and of each way in which that can end, as a table.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeMap;

use carryon_crds::BaseModelPool;
use carryon_crds::wire::FetchReport;
use carryon_operator::{pool, shared::Settings};
use common::{at, example, patched, summary, with};
use k8s_openapi::api::core::v1::Pod;
use serde_json::{Value, json};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// A pool of two pods whose model is fetched.
fn fetched(model: Value) -> BaseModelPool {
    let source = json!({"persistentVolumeClaim": null, "huggingFace": {"repository": "o/n", "revision": "main", "tokenSecretRef": {"name": "hf", "key": "token"}}});
    let model = patched(json!({"source": source}), &model);
    with(&example("quickstart/pool.yaml"), json!({"spec": {"replicas": 2, "model": model}}))
}

/// A pod whose container that fetches is in this state.
fn pod(name: &str, state: Value, last: Value) -> Pod {
    let done = state["terminated"]["exitCode"] == 0;
    let fetch = json!({"name": "fetch", "image": "", "imageID": "", "ready": done, "restartCount": 1, "state": state, "lastState": last});
    let own = json!({"name": "pool", "image": "", "imageID": "", "ready": false, "restartCount": 0, "state": {"waiting": {"reason": "PodInitializing"}}});
    let status = json!({"phase": "Pending", "initContainerStatuses": [fetch], "containerStatuses": [own]});
    let metadata = json!({"name": name, "labels": {"app.kubernetes.io/component": "pool"}});
    serde_json::from_value(json!({"metadata": metadata, "spec": {"nodeName": "node-1", "containers": []}, "status": status})).unwrap()
}

fn running() -> Value {
    json!({"running": {"startedAt": at(0)}})
}

fn terminated(code: i32, report: &Value) -> Value {
    json!({"terminated": {"exitCode": code, "message": report.to_string()}})
}

fn report(state: &str, bytes: u64, message: &str) -> FetchReport {
    serde_json::from_value(
        json!({"state": state, "bytes": bytes, "total": 61_100_000_000u64, "eta_seconds": 377, "message": message, "commit": COMMIT}),
    )
    .unwrap()
}

fn judge(pool: &BaseModelPool, pods: Vec<Pod>, fetches: &[(&str, FetchReport)], second: i64) -> carryon_crds::BaseModelPoolStatus {
    let fetches: BTreeMap<String, FetchReport> = fetches.iter().map(|(name, report)| ((*name).to_owned(), report.clone())).collect();
    let claim = Some(serde_json::from_value(json!({"metadata": {"name": "models"}})).unwrap());
    let observed = pool::Observed { claim, pods, fetches, ..pool::Observed::default() };
    let validated = pool::validate(pool, &observed, &Settings::default()).unwrap();
    let applied = pool::Applied { stateful_set: with(&pool::build(&validated).stateful_set, json!({"status": {"replicas": 2}})) };
    pool::status(pool, &Ok((validated, applied)), &observed, &at(second))
}

#[test]
fn bytes_and_time_are_told_and_the_commit_is_kept() {
    let mut pool = fetched(json!({}));
    let set = |pool: &BaseModelPool, observed: &pool::Observed| {
        let children = pool::build(&pool::validate(pool, observed, &Settings::default()).unwrap());
        (children.stateful_set.spec.unwrap().replicas, children.commit.map(|commit| commit.data.unwrap()["commit"].clone()))
    };
    // One pod alone resolves the revision.
    assert_eq!(set(&pool, &pool::Observed::default()), (Some(1), None));
    let pods = || vec![pod("b", running(), json!({})), pod("a", running(), json!({}))];
    let heard = [("a", report("fetching", 21_400_000_000, "21.40 GB of 61.10 GB")), ("b", report("waiting", 0, "another one fetches"))];
    let status = judge(&pool, pods(), &heard[..1], 0);
    assert_eq!(
        summary(&status.conditions),
        "Reconciling ModelFetching: 0 of 2 pods are ready; pod a fetches its model; 1 more fetch it too"
    );
    let download = status.download.clone().unwrap();
    assert_eq!(download.progress.as_deref(), Some("35 %, 21.4 GB of 61.1 GB, 7 min left"));
    assert_eq!((download.bytes, download.total_bytes, download.eta_seconds), (21_400_000_000, 61_100_000_000, Some(377)));
    pool.status = Some(status);
    assert_eq!(set(&pool, &pool::Observed::default()), (Some(2), Some(COMMIT.to_owned())));
    // A pod that says another one changes nothing.
    let other = FetchReport { commit: Some("f".repeat(40)), ..heard[0].1.clone() };
    assert_eq!(judge(&pool, pods(), &[("a", other)], 0).download.unwrap().revision.as_deref(), Some(COMMIT));
}

#[test]
fn the_deadline_is_for_pods_whose_fetch_stands_still() {
    let mut pool = fetched(json!({}));
    let at_bytes = |pool: &BaseModelPool, bytes, second| {
        judge(pool, vec![pod("a", running(), json!({}))], &[("a", report("fetching", bytes, ""))], second)
    };
    pool.status = Some(at_bytes(&pool, 1_000_000, 0));
    pool.status = Some(at_bytes(&pool, 2_000_000, 7000));
    let status = at_bytes(&pool, 2_000_000, 7300);
    assert!(summary(&status.conditions).starts_with("Reconciling ModelFetching"), "{}", summary(&status.conditions));
    let status = at_bytes(&pool, 2_000_000, 7000 + 7200);
    assert!(summary(&status.conditions).starts_with("Stalled ProgressDeadlineExceeded"), "{}", summary(&status.conditions));
    assert!(summary(&status.conditions).ends_with("pod a fetches its model"));
}

#[test]
fn each_failure_has_a_reason_and_says_what_to_do() {
    let failed = |failure: &str| json!({"state": "failed", "message": "because", "failure": failure});
    let crashed = |failure: &str| pod("a", json!({"waiting": {"reason": "CrashLoopBackOff"}}), terminated(1, &failed(failure)));
    let none = json!({});
    let claim = json!({"cache": {"persistentVolumeClaim": {"claimName": "models"}}});
    let host = json!({"cache": {"hostPath": {"path": "/var/models"}}});
    let authorities = json!({"caBundle": {"configMapKeyRef": {"name": "authorities", "key": "ca.crt"}}});
    let public = json!({"source": {"huggingFace": {"tokenSecretRef": null}}});
    let bucket = json!({"source": {"huggingFace": null, "objectStore": {"url": "s3://b/m", "secretRef": {"name": "s3"}}}});
    let config_error =
        |message: &str| pod("a", json!({"waiting": {"reason": "CreateContainerConfigError", "message": message}}), json!({}));
    let cannot = "pod a cannot fetch its model: because; ";
    let cases = [
        (&none, crashed("AccessDenied"), format!("Stalled ModelAccessDenied: {cannot}the token is key \"token\" of Secret \"hf\": it is read anew each time")),
        (&public, crashed("AccessDenied"), format!("Stalled ModelAccessDenied: {cannot}create a pool with spec.model.source.huggingFace.tokenSecretRef")),
        (&bucket, crashed("AccessDenied"), format!("Stalled ModelAccessDenied: {cannot}the credentials are those of Secret \"s3\": they are read anew each time")),
        (&none, crashed("NotFound"), format!("Stalled ModelNotFound: {cannot}create a pool with the right spec.model.source, or put it there")),
        (&none, crashed("Unreachable"), format!("Reconciling ModelSourceUnreachable: {cannot}it is asked again; see that pods of this namespace may connect to it (HTTPS_PROXY goes into spec.server.env)")),
        (&none, crashed("Untrusted"), format!("Stalled ModelSourceUntrusted: {cannot}name its authority in spec.model.caBundle of a new pool")),
        (&none, crashed("VolumeFull"), format!("Stalled ModelVolumeFull: {cannot}make room on the disk of node-1, or create a pool with spec.model.cache")),
        (&claim, crashed("VolumeFull"), format!("Stalled ModelVolumeFull: {cannot}make PersistentVolumeClaim \"models\" larger, or remove what nobody needs from it")),
        (&host, crashed("VolumeFull"), format!("Stalled ModelVolumeFull: {cannot}make room in /var/models of node-1")),
        (&host, crashed("VolumeReadOnly"), format!("Stalled ModelVolumeReadOnly: {cannot}let the pods' user (their runAsUser) write there")),
        (&none, crashed("Damaged"), format!("Reconciling ModelDamaged: {cannot}it is fetched again")),
        (&none, crashed("Unsupported"), format!("Stalled ModelUnsupported: {cannot}nothing but its configuration was fetched: name another model in a new pool")),
        (&none, crashed("OfTomorrow"), format!("Reconciling ModelFetchFailed: {cannot}it is tried again")),
        (&authorities, crashed("CaBundle"), "Reconciling ConfigMapNotFound: ConfigMap default/authorities (spec.model.caBundle) or its key \"ca.crt\" not found, or it holds no certificate: because".to_owned()),
        (&none, config_error("secret \"hf\" not found"), "Reconciling SecretKeyNotFound: Secret default/hf (spec.model.source.huggingFace.tokenSecretRef) or its key \"token\" not found: create it".to_owned()),
        (&none, config_error("couldn't find key token in Secret default/hf"), "Reconciling SecretKeyNotFound: Secret default/hf (spec.model.source.huggingFace.tokenSecretRef) or its key \"token\" not found: create it".to_owned()),
        (&bucket, config_error("secret \"s3\" not found"), "Reconciling SecretKeyNotFound: Secret default/s3 (spec.model.source.objectStore.secretRef) not found: create it".to_owned()),
        (&none, pod("a", running(), terminated(78, &failed("AccessDenied"))), format!("Stalled ModelAccessDenied: {cannot}the token is key \"token\" of Secret \"hf\": it is read anew each time")),
        (&none, pod("a", terminated(0, &json!({"state": "complete", "bytes": 5, "total": 5})), json!({})), "Reconciling PodsStarting: the others load the model".to_owned()),
    ];
    for (model, pod, says) in cases {
        let status = judge(&fetched(model.clone()), vec![pod], &[], 0);
        let said = summary(&status.conditions);
        // One of one, where the commit is not known yet.
        let said = said.replace("0 of 1 pods are ready; ", "").replace("0 of 2 pods are ready; ", "");
        assert_eq!(said, says, "{model}");
    }
}

#[test]
fn what_was_broken_off_is_told_until_a_byte_comes() {
    let retrying = report("retrying", 5, "hub.example: connection reset; it is asked again");
    let status = judge(&fetched(json!({})), vec![pod("a", running(), json!({}))], &[("a", retrying)], 0);
    assert!(summary(&status.conditions).ends_with("pod a fetches its model: hub.example: connection reset; it is asked again"));
}

#[test]
fn a_model_over_several_gpus_is_refused_by_name() {
    let refusal = |size: u32| {
        let pool: BaseModelPool = with(&fetched(json!({})), json!({"spec": {"engine": {"tensorParallelSize": size}}}));
        pool::validate(&pool, &pool::Observed::default(), &Settings::default()).err().map(|refusal| refusal.to_string())
    };
    assert_eq!(refusal(1), None);
    assert!(
        refusal(2).unwrap().starts_with("spec.engine.tensorParallelSize is 2: a model that is split over several GPUs is not built yet")
    );
}

#[test]
fn a_cache_without_its_claim_waits() {
    let pool = fetched(json!({"cache": {"persistentVolumeClaim": {"claimName": "models"}}}));
    let refusal = pool::validate(&pool, &pool::Observed::default(), &Settings::default()).unwrap_err();
    assert_eq!(refusal.to_string(), "PersistentVolumeClaim default/models (spec.model.cache) not found: create it");
}
