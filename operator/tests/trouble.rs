//! What is wrong with pods: whose container counts, what is said of it, and whether waiting helps.
#![allow(clippy::unwrap_used)]

mod common;

use carryon_operator::shared::trouble::{self, Trouble};
use carryon_operator::shared::worker;
use common::patched;
use k8s_openapi::api::core::v1::Pod;
use serde_json::{Value, json};

fn container(name: &str, patch: Value) -> Value {
    patched(json!({"name": name, "image": "", "imageID": "", "ready": false, "restartCount": 0}), &patch)
}

fn ended(name: &str, code: i32, message: &str, restarts: i32) -> Value {
    container(name, json!({"restartCount": restarts, "lastState": {"terminated": {"exitCode": code, "message": message}}}))
}

fn running(name: &str) -> Value {
    container(name, json!({"ready": true, "started": true, "state": {"running": {}}}))
}

fn pod(containers: Vec<Value>, patch: Value) -> Pod {
    let labels = json!({"app.kubernetes.io/component": "pool"});
    let pod = json!({"metadata": {"name": "a", "labels": labels}, "status": {"containerStatuses": containers}});
    serde_json::from_value(patched(pod, &patch)).unwrap()
}

fn says(pod: Pod) -> Option<(bool, String)> {
    trouble::find(&[pod]).map(|Trouble { permanent, message, .. }| (permanent, message))
}

#[test]
fn a_sidecar_does_not_hide_the_worker() {
    let mesh = || running("istio-proxy");
    let refused = ended("pool", 78, "error: no model.gguf", 1);
    let said = "pod a ended with exit code 78 and was restarted once; it said: error: no model.gguf";
    assert_eq!(says(pod(vec![mesh(), refused.clone()], json!({}))), Some((true, said.to_owned())));
    // A native sidecar is an init container that runs on; its own readiness is no matter while the worker has something to say.
    let native = container("istio-proxy", json!({"started": true, "restartCount": 4, "state": {"running": {}}}));
    assert_eq!(says(pod(vec![refused], json!({"status": {"initContainerStatuses": [native]}}))), Some((true, said.to_owned())));

    let pod = pod(vec![ended("istio-proxy", 0, "", 0), ended("pool", 75, "checkpointed", 0)], json!({}));
    assert_eq!(trouble::last_end(&pod).unwrap().exit_code, 75);
}

#[test]
fn a_sidecar_that_fails_is_named_and_speaks_for_nobody_else() {
    let pair = || vec![ended("istio-proxy", 78, "no xds", 1), running("pool")];
    let said = "container istio-proxy of pod a ended with exit code 78 and was restarted once; it said: no xds";
    assert_eq!(says(pod(pair(), json!({}))), Some((false, said.to_owned())));
    // The pod is not ready, but that is no sign of a lost node.
    let unready = json!({"type": "Ready", "status": "False", "reason": "ContainersNotReady", "message": "containers with unready status"});
    let on_a_node = json!({"spec": {"nodeName": "n", "containers": []}, "status": {"conditions": [unready]}});
    assert_eq!(says(pod(pair(), on_a_node)), Some((false, said.to_owned())));
    let gated = json!({"type": "Ready", "status": "False", "reason": "ReadinessGatesNotReady", "message": "the target is not registered"});
    let on_a_node = json!({"spec": {"nodeName": "n", "containers": []}, "status": {"conditions": [gated]}});
    assert_eq!(says(pod(vec![running("pool")], on_a_node)), None);
    // Ahead of the worker: nothing else can run.
    let waits = container("pool", json!({"state": {"waiting": {"reason": "PodInitializing"}}}));
    let status = json!({"status": {"initContainerStatuses": [ended("istio-validation", 126, "", 1)]}});
    let said = "container istio-validation of pod a ended with exit code 126 and was restarted once; see its log";
    assert_eq!(says(pod(vec![waits], status)), Some((false, said.to_owned())));
}

#[test]
fn who_crashes_again_and_again_waits_in_vain() {
    for (restarts, permanent) in [(1, false), (2, false), (3, true)] {
        let (is_permanent, _) = says(pod(vec![ended("pool", 1, "", restarts)], json!({}))).unwrap();
        assert_eq!(is_permanent, permanent, "{restarts}");
    }
    let leaving = json!({"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}});
    assert_eq!(says(pod(vec![ended("pool", 1, "", 3)], leaving)), None, "another takes its place");

    let unscheduled = json!({"type": "PodScheduled", "status": "False", "message": "0/3 nodes are available"});
    let first = pod(vec![], json!({"status": {"conditions": [unscheduled]}}));
    let second = pod(vec![ended("pool", 78, "bad", 1)], json!({"metadata": {"name": "b"}}));
    assert_eq!(trouble::find(&[first, second]).unwrap().reason, "WorkerRefused", "what waiting does not cure comes first");
}

#[test]
fn what_others_say_is_cut_short() {
    let long = "no\u{1b}[31m".to_owned() + &"x".repeat(100_000);
    let waits = container("pool", json!({"state": {"waiting": {"reason": "ErrImagePull", "message": long}}}));
    let unscheduled = json!({"type": "PodScheduled", "status": "False", "message": long});
    let cases = [
        pod(vec![ended("pool", 1, &long, 1)], json!({})),
        pod(vec![waits], json!({})),
        pod(vec![], json!({"status": {"conditions": [unscheduled]}})),
    ];
    for pod in cases {
        let (_, message) = says(pod).unwrap();
        assert!(message.chars().count() < 700 && message.ends_with('…') && !message.contains('\u{1b}'), "{message}");
    }
}

#[test]
fn the_worker_is_asked_at_its_own_port() {
    let ports = |port: i32| json!([{"containerPort": port}]);
    let containers = json!([{"name": "istio-proxy", "ports": ports(15090)}, {"name": "pool", "ports": ports(8080)}]);
    let pod = pod(vec![running("istio-proxy"), running("pool")], json!({"spec": {"containers": containers}}));
    assert_eq!((worker::port(&pod), worker::status(&pod).unwrap().name.as_str()), (Some(8080), "pool"));
}
