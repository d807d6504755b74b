//! The test cluster itself: what tests on it may rely on, and that nothing of it stays.

#![allow(clippy::unwrap_used)] // a test may fail by panicking, in its helpers too

mod traces;

use std::fs;

use carryon_tests::cluster::TestCluster;
use k8s_openapi::api::core::v1::{ConfigMap, Node, PersistentVolumeClaim, Pod};
use kube::Api;
use kube::api::{DeleteParams, PostParams};
use serde_json::{Value, json};

/// A restricted pod on a node that runs a line of shell and has a claim at /shared.
fn pod(name: &str, node: &str, claim: &str, line: &str) -> Pod {
    let pod: Value = json!({
        "metadata": { "name": name },
        "spec": {
            "nodeSelector": { "kubernetes.io/hostname": node },
            "restartPolicy": "Never",
            "securityContext": { "runAsNonRoot": true, "runAsUser": 4321, "seccompProfile": { "type": "RuntimeDefault" } },
            "containers": [{
                "name": "shell",
                "image": "localhost/carry-on/shell:test",
                "command": ["sh", "-ec", line],
                "securityContext": { "allowPrivilegeEscalation": false, "readOnlyRootFilesystem": true, "capabilities": { "drop": ["ALL"] } },
                "volumeMounts": [{ "name": "shared", "mountPath": "/shared" }],
            }],
            "volumes": [{ "name": "shared", "persistentVolumeClaim": { "claimName": claim } }],
        },
    });
    serde_json::from_value(pod).unwrap()
}

fn claim(cluster: &TestCluster, name: &str) {
    let spec = json!({ "accessModes": ["ReadWriteMany"], "resources": { "requests": { "storage": "1Gi" } } });
    let claim: PersistentVolumeClaim = serde_json::from_value(json!({ "metadata": { "name": name }, "spec": spec })).unwrap();
    let claims: Api<PersistentVolumeClaim> = Api::default_namespaced(cluster.client());
    cluster.block_on(claims.create(&PostParams::default(), &claim)).unwrap();
}

/// What a pod printed, once it has succeeded.
fn words(cluster: &TestCluster, pod: &str) -> String {
    let pods: Api<Pod> = Api::default_namespaced(cluster.client());
    cluster.eventually(&format!("{pod} ends"), async || {
        let phase = pods.get(pod).await.unwrap().status.and_then(|status| status.phase)?;
        assert_ne!(phase, "Failed", "{pod}: {}", pods.logs(pod, &kube::api::LogParams::default()).await.unwrap_or_default());
        (phase == "Succeeded").then_some(())
    });
    cluster.block_on(pods.logs(pod, &kube::api::LogParams::default())).unwrap()
}

fn ready(node: &Node) -> Option<String> {
    let conditions = node.status.as_ref()?.conditions.as_ref()?;
    conditions.iter().find(|condition| condition.type_ == "Ready").map(|condition| condition.status.clone())
}

#[test]
fn two_nodes_share_names_and_volumes_and_leave_nothing() {
    let Some(cluster) = TestCluster::start(2).and_then(TestCluster::ours_only) else { return };
    let traces = traces::of(&cluster);
    let nodes: Api<Node> = Api::all(cluster.client());
    let found = cluster.block_on(nodes.list(&Default::default())).unwrap();
    let found: Vec<_> = found.iter().map(|node| (node.metadata.name.clone().unwrap(), ready(node).unwrap())).collect();
    assert_eq!(found, [("node1".to_owned(), "True".to_owned()), ("node2".to_owned(), "True".to_owned())]);

    let given = std::env::temp_dir().join(format!("carryon-given-{}", std::process::id()));
    fs::write(&given, "given by the test\n").unwrap();
    cluster.claim("default", "given", &[("folder/file.txt", &given)]);
    fs::remove_file(&given).unwrap();
    claim(&cluster, "given");
    let pods: Api<Pod> = Api::default_namespaced(cluster.client());
    let write = "getent hosts kubernetes.default.svc; cat /shared/folder/file.txt; echo written on the second node > /shared/answer";
    let read = "until [ -e /shared/answer ]; do sleep 0.1; done; cat /shared/answer";
    for pod in [pod("writer", "node2", "given", write), pod("reader", "node1", "given", read)] {
        cluster.block_on(pods.create(&PostParams::default(), &pod)).unwrap();
    }
    let written = words(&cluster, "writer");
    assert!(written.starts_with("10.96.0.1 "), "kubernetes.default.svc is not found: {written}");
    assert!(written.ends_with("given by the test\n"), "{written}");
    assert_eq!(words(&cluster, "reader"), "written on the second node\n");

    let scheduled = |entry: &carryon_tests::cluster::AuditEntry| {
        (entry.user.as_str(), entry.resource.as_str(), entry.subresource.as_str()) == ("system:kube-scheduler", "pods", "binding")
    };
    let audit = cluster.audit();
    let mut bound: Vec<_> =
        audit.iter().filter(|entry| scheduled(entry) && entry.namespace == "default").map(|entry| &entry.name).collect();
    bound.sort();
    assert_eq!(bound, ["reader", "writer"]);

    cluster.add_extended_resource("node1", "nvidia.com/gpu", 8);
    let node = cluster.block_on(nodes.get("node1")).unwrap().status.unwrap();
    assert_eq!(node.allocatable.unwrap()["nvidia.com/gpu"].0, "8");

    cluster.kill_node(2);
    cluster
        .eventually("the second node's death is noticed", async || (ready(&nodes.get("node2").await.unwrap())? == "Unknown").then_some(()));
    drop(cluster);
    assert_eq!(traces.found(), Vec::<String>::new());
}

#[test]
fn an_api_server_alone_tells_who_wrote_and_collects_garbage_when_asked() {
    let controllers = ["garbage-collector-controller"];
    let Some(cluster) = TestCluster::api_server_with(&controllers).and_then(TestCluster::ours_only) else { return };
    let traces = traces::of(&cluster);
    let maps: Api<ConfigMap> = Api::default_namespaced(cluster.client());
    let map = |name: &str, owner: Option<&ConfigMap>| {
        let owner =
            owner.map(|owner| json!({ "apiVersion": "v1", "kind": "ConfigMap", "name": owner.metadata.name, "uid": owner.metadata.uid }));
        let owners: Vec<Value> = owner.into_iter().collect();
        serde_json::from_value::<ConfigMap>(json!({ "metadata": { "name": name, "ownerReferences": owners } })).unwrap()
    };
    let owner = cluster.block_on(maps.create(&PostParams::default(), &map("owner", None))).unwrap();
    cluster.block_on(maps.create(&PostParams::default(), &map("owned", Some(&owner)))).unwrap();
    assert_eq!(cluster.kubectl(&["get", "configmap", "owned", "-o", "name"]), "configmap/owned\n");
    cluster.block_on(maps.delete("owner", &DeleteParams::default())).unwrap();
    cluster.eventually("what was owned is collected", async || maps.get_opt("owned").await.unwrap().is_none().then_some(()));

    let collector = "system:serviceaccount:kube-system:generic-garbage-collector";
    let expected =
        [("create", "owner", "admin"), ("create", "owned", "admin"), ("delete", "owner", "admin"), ("delete", "owned", collector)];
    cluster.eventually("the audit log holds four writes", async || {
        let audit = cluster.audit();
        let ours =
            audit.iter().filter(|entry| entry.resource == "configmaps" && entry.namespace == "default" && entry.name.starts_with("own"));
        let written: Vec<_> = ours.map(|entry| (entry.verb.as_str(), entry.name.as_str(), entry.user.as_str())).collect();
        assert!(expected.starts_with(&written), "{written:?}");
        (written == expected).then_some(())
    });
    drop(cluster);
    assert_eq!(traces.found(), Vec::<String>::new());
}
