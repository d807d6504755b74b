//! Workloads without controllers and nodes: each gets its pods, and they and it the statuses of a good life.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::StreamExt as _;
use k8s_openapi::api::apps::v1::{Deployment, StatefulSet};
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Patch, PatchParams, PostParams};
use kube::runtime::WatchStreamExt as _;
use kube::runtime::watcher::{self, watcher};
use kube::{Api, Client, ResourceExt as _};
use serde_json::{Value, json};
use tokio::sync::Semaphore;

use super::hollow::{Fate, answer, ended, model, patch, progress, running};
use super::{Object, TestCluster};
use carryon_crds::names;
use carryon_crds::wire::Progress;

/// Workloads of a type that are written for at the same time: Kubernetes' controllers sync five unless they are told otherwise.
const SYNCS: usize = 5;

/// Plays the pods of StatefulSets and Deployments, which stay, and of Jobs, which end well after that long, until the cluster is dropped.
/// Whoever asks a trainer finds it a step further than the second before.
pub fn play(cluster: &TestCluster, training: Duration) {
    let started = Instant::now();
    cluster.block_on(answer(move || Progress { total_steps: 100_000, ..progress(started.elapsed().as_secs()) }));
    cluster.spawn(follow::<StatefulSet>(cluster.client(), training));
    cluster.spawn(follow::<Deployment>(cluster.client(), training));
    cluster.spawn(follow::<Job>(cluster.client(), training));
}

async fn follow<K: Object>(client: Client, training: Duration) {
    let ours = watcher::Config::default().labels(&format!("app.kubernetes.io/managed-by={}", names::MANAGER));
    let mut known = BTreeSet::new();
    let syncs = Arc::new(Semaphore::new(SYNCS));
    let workloads = watcher(Api::<K>::all(client.clone()), ours).default_backoff().applied_objects();
    workloads
        .for_each(|workload| {
            if let Ok(workload) = workload
                && known.insert(workload.uid())
            {
                let (client, syncs) = (client.clone(), syncs.clone());
                tokio::spawn(async move { live(&client, &workload, &syncs, training).await.expect("what is played is taken") });
            }
            std::future::ready(())
        })
        .await;
}

async fn live<K: Object>(client: &Client, workload: &K, syncs: &Semaphore, training: Duration) -> kube::Result<()> {
    let sync = async || syncs.acquire().await.expect("is never closed");
    let space = workload.namespace().unwrap_or_default();
    let (pods, workloads) = (Api::<Pod>::namespaced(client.clone(), &space), Api::<K>::namespaced(client.clone(), &space));
    let set = async |status: Value| {
        workloads.patch_status(&workload.name_any(), &PatchParams::default(), &Patch::Merge(json!({ "status": status }))).await
    };
    let object = json!(workload);
    let replicas = object["spec"]["replicas"].as_u64().unwrap_or(1);
    let mut made = Vec::new();
    let syncing = sync().await;
    for number in 0..replicas {
        let pod = pod(workload, &object["spec"]["template"], number);
        made.push(pods.create(&PostParams::default(), &pod).await?);
    }
    for pod in &made {
        patch(client, pod, &running(pod)).await?;
    }
    if K::kind(&()) != "Job" {
        let generation = workload.meta().generation;
        set(json!({ "replicas": replicas, "readyReplicas": replicas, "updatedReplicas": replicas, "observedGeneration": generation }))
            .await?;
        return Ok(());
    }
    drop(syncing);
    tokio::time::sleep(training).await;
    let _syncing = sync().await;
    let Fate::Ends(code, words) = Fate::complete(&model().identity.digest()) else { unreachable!("a good end is an end") };
    for pod in &made {
        patch(client, pod, &ended(pod, code, &words)).await?;
    }
    let now = json!(k8s_openapi::jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string());
    let condition = |type_: &str| json!({ "type": type_, "status": "True", "lastProbeTime": now, "lastTransitionTime": now });
    let conditions = ["SuccessCriteriaMet", "Complete"].map(condition);
    set(json!({ "startTime": now, "completionTime": now, "succeeded": replicas, "conditions": conditions })).await?;
    Ok(())
}

fn pod<K: Object>(workload: &K, template: &Value, number: u64) -> Pod {
    let mut pod = template.clone();
    let name = format!("{}-{number}", workload.name_any());
    json_patch::merge(&mut pod, &json!({ "metadata": { "name": name, "ownerReferences": [workload.controller_owner_ref(&())] } }));
    serde_json::from_value(pod).expect("a template makes a pod")
}
