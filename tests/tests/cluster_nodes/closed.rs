//! Who reaches a pool and a trainer that NetworkPolicies close, where the nodes enforce them.

use std::collections::BTreeMap;

use carryon_crds::CarryOnJob;
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt as _;
use serde_json::json;

use super::world::{World, short_job};

const NAME: &str = "closed";
/// curl's word for an answer, and for none in time.
const ANSWERED: &str = "0";
const UNANSWERED: &str = "28";

/// Only a trainer or a gateway of the pool's namespace reaches the pool, and no pod but the operator's the trainer.
pub fn closed(world: &World, space: &str) {
    if !world.cluster.may("pods that are kept from each other: the nodes may not enforce NetworkPolicies") {
        return;
    }
    // More steps than any machine makes meanwhile.
    world.apply(space, &short_job(NAME, 2000));
    let job = || world.get::<CarryOnJob>(space, NAME).status.unwrap_or_default();
    world.wait("the operator hears of the trainer's steps", || job().progress.is_some_and(|progress| progress.step > 0));
    let running = || world.pods(space, "trainer").into_iter().find(|pod| pod.labels()["app.kubernetes.io/instance"] == NAME).unwrap();
    let (trainer, pool) = (running(), world.pod(space, "pool"));
    let urls = [("pool", &pool, 8080), ("trainer", &trainer, 8081)]
        .map(|(name, pod, port)| (name, format!("http://{}:{port}/healthz", pod.status.as_ref().unwrap().pod_ip.as_ref().unwrap())));

    let like = |component: &str| json!({ "app.kubernetes.io/name": "carry-on", "app.kubernetes.io/component": component });
    let tries = [
        ("default", "like-a-trainer", like("trainer"), [UNANSWERED, UNANSWERED]),
        (space, "stranger", json!({}), [UNANSWERED, UNANSWERED]),
        // Which shows that the others would get an answer if they were let through.
        (space, "like-a-gateway", like("gateway"), [ANSWERED, UNANSWERED]),
    ];
    for (namespace, name, labels, _) in &tries {
        world.cluster.apply(namespace, &asks(name, labels, &urls));
    }
    for (namespace, name, _, expected) in tries {
        let heard = heard(world, namespace, name);
        assert_eq!([&*heard["pool"], &*heard["trainer"]], expected, "{namespace}/{name}");
        world.delete::<Pod>(namespace, name);
    }
    let lives = |pod: &Pod| pod.uid().zip(pod.status.as_ref().and_then(|status| status.pod_ip.clone()));
    assert_eq!([lives(&running()), lives(&world.pod(space, "pool"))], [lives(&trainer), lives(&pool)], "nobody was there to answer");
    world.delete::<CarryOnJob>(space, NAME);
}

/// A pod that asks each URL once, and tells how that ended.
fn asks(name: &str, labels: &serde_json::Value, urls: &[(&str, String)]) -> String {
    let asks = urls.iter().map(|(name, url)| format!("ask {name} {url} & "));
    let line = format!("ask() {{ curl --silent --output /dev/null --max-time 5 $2; echo $1 $?; }}; {}wait", asks.collect::<String>());
    let pod = json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": { "name": name, "labels": labels },
        "spec": {
            "restartPolicy": "Never",
            "automountServiceAccountToken": false,
            "securityContext": { "runAsNonRoot": true, "runAsUser": 4321, "seccompProfile": { "type": "RuntimeDefault" } },
            "containers": [{
                "name": "shell",
                "image": "localhost/carry-on/shell:test",
                "command": ["sh", "-c", line],
                "securityContext": { "allowPrivilegeEscalation": false, "readOnlyRootFilesystem": true, "capabilities": { "drop": ["ALL"] } },
            }],
        },
    });
    pod.to_string()
}

/// How a pod's asks ended, by whom it asked.
fn heard(world: &World, namespace: &str, name: &str) -> BTreeMap<String, String> {
    let phase = || world.get::<Pod>(namespace, name).status.unwrap_or_default().phase.unwrap_or_default();
    world.wait(&format!("{namespace}/{name} has asked"), || phase() == "Succeeded");
    let log = world.cluster.kubectl(&["--namespace", namespace, "logs", name]);
    log.lines().filter_map(|line| line.split_once(' ')).map(|(whom, end)| (whom.to_owned(), end.to_owned())).collect()
}
