//! Rollouts that do not get on: who serves meanwhile, and what is said in whose words.
#![allow(clippy::unwrap_used)]

mod common;

use carryon_crds::{BaseModelPool, CarryOnDeployment, CarryOnDeploymentStatus};
use carryon_operator::shared::rollout::refusal;
use carryon_operator::{deployment, pool, shared::Refusal, shared::Settings};
use common::{at, example, summary, with};
use k8s_openapi::api::core::v1::Pod;
use serde_json::{Value, json};

fn head(letter: &str) -> Value {
    let artifact = json!({"source": {"persistentVolumeClaim": {"claimName": "out", "path": letter}}, "digest": format!("sha256:{}", letter.repeat(64))});
    json!({"spec": {"heads": [{"name": "quickstart", "source": {"artifact": artifact}}]}})
}

fn pod(name: &str, ready: bool, container: Value) -> Pod {
    let status = common::patched(json!({"name": "gateway", "image": "", "imageID": "", "ready": ready, "restartCount": 0}), &container);
    let conditions = json!([{"type": "Ready", "status": if ready { "True" } else { "False" }}]);
    let labels = json!({"app.kubernetes.io/component": "gateway"});
    let pod = json!({"metadata": {"name": name, "labels": labels}, "status": {"containerStatuses": [status], "conditions": conditions}});
    serde_json::from_value(pod).unwrap()
}

fn crashed(name: &str) -> Pod {
    let last = json!({"terminated": {"exitCode": 1, "message": "error: head.safetensors is cut off"}});
    pod(name, false, json!({"restartCount": 3, "lastState": last}))
}

fn observed(pods: Vec<Pod>) -> deployment::Observed {
    let pool = example("quickstart/pool.yaml");
    let claim = serde_json::from_value(json!({"metadata": {"name": "out"}})).unwrap();
    deployment::Observed { pool: Some(pool), claims: vec![claim], pods, ..deployment::Observed::default() }
}

/// One look at `deployment`, whose gateway has this status.
fn look(deployment: &CarryOnDeployment, gateway: Value, pods: Vec<Pod>) -> (String, CarryOnDeployment) {
    let observed = observed(pods);
    let validated = deployment::validate(deployment, &observed, &Settings::default()).unwrap();
    let rendered = deployment::build(&validated).deployment;
    let applied = deployment::Applied { deployment: with(&rendered, json!({"metadata": {"generation": 2}, "status": gateway})) };
    let status = deployment::status(deployment, &Ok((validated, applied)), &observed, &at(0));
    (summary(&status.conditions), CarryOnDeployment { status: Some(status), ..deployment.clone() })
}

fn settled() -> Value {
    json!({"replicas": 1, "readyReplicas": 1, "updatedReplicas": 1, "observedGeneration": 2})
}

/// The old gateway serves, the new one is not ready.
fn rolling() -> Value {
    json!({"replicas": 2, "readyReplicas": 1, "updatedReplicas": 1, "observedGeneration": 2})
}

fn status(deployment: &CarryOnDeployment) -> &CarryOnDeploymentStatus {
    deployment.status.as_ref().unwrap()
}

fn heads(deployment: &CarryOnDeployment) -> (Option<&str>, Option<&str>) {
    let head = &status(deployment).heads[0];
    (head.resolved.as_ref().map(|head| head.uri.as_str()), head.stable.as_ref().map(|head| head.uri.as_str()))
}

#[test]
fn stable_is_what_ready_pods_serve_and_resolved_what_the_spec_says() {
    let first: CarryOnDeployment = with(&example("quickstart/deployment.yaml"), head("a"));
    let (_, first) = look(&first, json!({"replicas": 1, "updatedReplicas": 1, "observedGeneration": 2}), vec![]);
    assert_eq!(heads(&first), (Some("pvc://out/a"), None), "rendered is not served");
    let (_, first) = look(&first, settled(), vec![]);
    assert_eq!(heads(&first), (Some("pvc://out/a"), Some("pvc://out/a")));

    let second: CarryOnDeployment = with(&first, head("b"));
    let unseen = json!({"replicas": 1, "readyReplicas": 1, "updatedReplicas": 1, "observedGeneration": 1});
    for gateway in [unseen, rolling()] {
        let (_, second) = look(&second, gateway, vec![]);
        assert_eq!(heads(&second), (Some("pvc://out/b"), Some("pvc://out/a")));
    }
    let (_, second) = look(&second, settled(), vec![]);
    assert_eq!(heads(&second), (Some("pvc://out/b"), Some("pvc://out/b")));
    let none: CarryOnDeployment = with(&second, json!({"spec": {"replicas": 0}}));
    let (_, none) = look(&with(&none, head("c")), json!({"observedGeneration": 2}), vec![]);
    assert_eq!(heads(&none), (Some("pvc://out/c"), Some("pvc://out/b")), "where nobody serves nothing is proven");
}

#[test]
fn a_refusal_takes_nothing_away_from_what_serves() {
    let (_, serving) = look(&with(&example("quickstart/deployment.yaml"), head("a")), settled(), vec![]);
    let refusal = Refusal::waiting("Forbidden", "may not");
    let pods = vec![pod("a", true, json!({})), crashed("b")];
    let refused = deployment::status(&serving, &Err(refusal.clone()), &observed(pods), &at(1));
    assert_eq!(refused.url.as_deref(), Some("http://quickstart-gateway.default.svc:8000/v1"));
    let (now, before) = (&refused.heads[0], &status(&serving).heads[0]);
    assert_eq!((&now.stable, &now.resolved), (&before.stable, &before.resolved));
    assert_eq!((refused.replicas, refused.ready_replicas), (2, 1), "counted, not remembered");
    let new: CarryOnDeployment = example("quickstart/deployment.yaml");
    assert_eq!(deployment::status(&new, &Err(refusal), &observed(vec![]), &at(1)).url, None, "nothing serves yet");
}

#[test]
fn a_gateway_that_cannot_get_on_is_stalled_in_the_apis_words_until_it_can() {
    let deployment: CarryOnDeployment = with(&example("quickstart/deployment.yaml"), head("a"));
    let condition = |type_: &str, status: &str, reason: &str, message: &str| json!({"conditions": [{"type": type_, "status": status, "reason": reason, "message": message}]});
    let quota =
        "pods \"quickstart-gateway-5d-x7v2p\" is forbidden: exceeded quota: small, requested: pods=1, used: pods=2, limited: pods=2";
    let late = "ReplicaSet \"quickstart-gateway-5d\" has timed out progressing.";
    let cases = [
        (
            json!({}),
            vec![crashed("b"), pod("a", true, json!({}))],
            "Stalled PodCrashing: the gateways of before still serve; pod b ended with exit code 1 and was restarted 3 times; it said: error: head.safetensors is cut off",
        ),
        (
            condition("ReplicaFailure", "True", "FailedCreate", quota),
            vec![],
            "Stalled FailedCreate: the gateways of before still serve; no pod can be created: exceeded quota: small, requested: pods=1, used: pods=2, limited: pods=2",
        ),
        (
            condition("Progressing", "False", "ProgressDeadlineExceeded", late),
            vec![],
            "Stalled ProgressDeadlineExceeded: the gateways of before still serve; ReplicaSet \"quickstart-gateway-5d\" has timed out progressing.",
        ),
        (
            condition("Progressing", "False", "ReplicaSetCreateError", ""),
            vec![],
            "Reconciling GatewayRolling: 1 of 1 gateways run the present configuration",
        ),
    ];
    for (conditions, pods, says) in cases {
        let (said, stalled) = look(&deployment, common::patched(rolling(), &conditions), pods);
        assert_eq!(said, says);
        assert_eq!(look(&stalled, settled(), vec![]).0, "Ready Serving: 1 of 1 gateways serve quickstart");
    }
}

#[test]
fn a_refusal_is_told_without_the_name_that_each_attempt_draws_anew() {
    let reason = "ValidatingAdmissionPolicy 'a' with binding 'b' denied request: no";
    for said in ["is forbidden: ", "is invalid: : "] {
        assert_eq!(refusal(&format!("Error creating: pods \"quickstart-1-x7v2p\" {said}{reason}")), reason);
    }
    assert_eq!(refusal("the server could not do it"), "the server could not do it");
}

#[test]
fn pods_that_leave_trouble_nobody() {
    let deployment: CarryOnDeployment = with(&example("quickstart/deployment.yaml"), head("a"));
    let earlier: Pod = with(&crashed("b"), json!({"metadata": {"annotations": {"carryon.dev/config-digest": "sha256:another"}}}));
    let starting = json!({"replicas": 2, "updatedReplicas": 1, "observedGeneration": 2});
    let (said, _) = look(&deployment, starting, vec![earlier]);
    assert_eq!(said, "Reconciling GatewayStarting: 0 of 1 gateways are ready; the others push the head");
}

#[test]
fn a_pool_that_cannot_get_on_is_stalled_until_it_can() {
    let claim = serde_json::from_value(json!({"metadata": {"name": "models"}})).ok();
    let look = |pool: &BaseModelPool, counts: Value, refused: Option<&str>, second: i64| {
        let observed = pool::Observed { claim: claim.clone(), refused: refused.map(str::to_owned), ..pool::Observed::default() };
        let validated = pool::validate(pool, &observed, &Settings::default()).unwrap();
        let set = with(&pool::build(&validated).stateful_set, json!({"metadata": {"generation": 1}, "status": counts}));
        let status = pool::status(pool, &Ok((validated, pool::Applied { stateful_set: set })), &observed, &at(second));
        (summary(&status.conditions), BaseModelPool { status: Some(status), ..pool.clone() })
    };
    let pool: BaseModelPool = with(&example("quickstart/pool.yaml"), json!({"spec": {"replicas": 2}}));
    let counts = |replicas: i32, ready: i32| json!({"replicas": replicas, "readyReplicas": ready, "updatedReplicas": replicas, "observedGeneration": 1});
    let words = "create Pod smollm2-pool-1 in StatefulSet smollm2-pool failed error: pods \"smollm2-pool-1\" is forbidden: unable to validate against any security context constraint";
    let says =
        "Stalled FailedCreate: 1 of 2 pods are ready; no pod can be created: unable to validate against any security context constraint";
    assert_eq!(look(&pool, counts(1, 1), Some(words), 0).0, says);
    assert!(look(&pool, counts(2, 1), Some(words), 0).0.starts_with("Reconciling PodsStarting"), "it was created since");

    let starting = "Reconciling PodsStarting: 0 of 2 pods are ready; the others load the model";
    let (said, first) = look(&pool, counts(2, 0), None, 0);
    assert_eq!(said, starting);
    let (said, late) = look(&first, counts(2, 0), None, 7200);
    assert_eq!(said, "Stalled ProgressDeadlineExceeded: 0 of 2 pods are ready; none has become ready since 2023-11-14T22:13:20Z");
    let (said, again) = look(&late, counts(2, 0), None, 9000);
    assert!(said.starts_with("Stalled ProgressDeadlineExceeded"), "{said}");
    assert_eq!(again.status, late.status, "it says so once");
    // A pod that becomes ready is progress, and so is another spec.
    let (said, one) = look(&late, counts(2, 1), None, 9000);
    assert_eq!(said, "Reconciling PodsStarting: 1 of 2 pods are ready; the others load the model");
    assert!(look(&one, counts(2, 1), None, 16_199).0.starts_with("Reconciling"));
    assert!(look(&one, counts(2, 1), None, 16_200).0.starts_with("Stalled"));
    let edited = with(&late, json!({"metadata": {"generation": 2}}));
    assert_eq!(look(&edited, counts(2, 0), None, 9000).0, starting);
    let (_, done) = look(&late, counts(2, 2), None, 9000);
    assert_eq!(done.status.unwrap().waiting_since, None);
}
