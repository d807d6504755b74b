//! A cluster with Carry-On installed and the quick start's objects in it.

use std::collections::BTreeMap;
use std::time::Duration;

use carryon_crds::condition::types::READY;
use carryon_crds::{BaseModelPool, CarryOnDeployment, CarryOnJob, names};
use carryon_tests::cluster::hollow::{CONTROLLERS, Hollow};
use carryon_tests::cluster::{AuditEntry, Object, TestCluster};
use carryon_tests::example;
use carryon_tests::operator::{ACCOUNT, Operator, agent};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::Api;
use kube::api::{ListParams, Patch, PatchParams};
use serde_json::{Value, json};

pub struct World {
    pub cluster: TestCluster,
    pub hollow: Hollow,
    /// Ours in a cluster that other tests are in too.
    namespaces: Vec<&'static str>,
}

impl World {
    /// A cluster of its own, where a test may change definitions, rights and nodes. None, after a word about it, when this machine cannot have one.
    pub fn start() -> Option<Self> {
        let cluster = TestCluster::api_server_with(&CONTROLLERS).and_then(TestCluster::ours_only)?;
        Operator::install(&cluster);
        Some(Self::of(cluster))
    }

    /// In a cluster of its own that has been installed into.
    pub fn of(cluster: TestCluster) -> Self {
        let hollow = Hollow::start(&cluster, None);
        Self { cluster, hollow, namespaces: Vec::new() }
    }

    /// These namespaces in the cluster that tests share. None, after a word about it, when this machine cannot have one.
    pub fn within(namespaces: &[&'static str]) -> Option<Self> {
        let cluster = TestCluster::shared(&CONTROLLERS, Operator::install).and_then(TestCluster::ours_only)?;
        let hollow = Hollow::start(&cluster, Some(namespaces));
        Some(Self { cluster, hollow, namespaces: namespaces.to_vec() })
    }

    /// An operator for all of this world: one for all namespaces, or one for each that is ours.
    pub fn operate(&self) -> Vec<Operator> {
        if self.namespaces.is_empty() {
            return vec![Operator::start(&self.cluster, None)];
        }
        self.namespaces.iter().map(|namespace| Operator::start(&self.cluster, Some(namespace))).collect()
    }

    pub fn api<K: Object>(&self, namespace: &str) -> Api<K> {
        Api::namespaced(self.cluster.client(), namespace)
    }

    /// The quick start's claims and three objects, in a namespace of their own.
    pub fn quickstart(&self, namespace: &str) {
        self.volumes(namespace);
        self.manifests(namespace);
    }

    /// The quick start's three objects.
    pub fn manifests(&self, namespace: &str) {
        for manifest in ["pool", "job", "deployment"] {
            self.cluster.apply(namespace, &example(&format!("quickstart/{manifest}.yaml")));
        }
    }

    pub fn volumes(&self, namespace: &str) {
        self.cluster.kubectl(&["create", "namespace", namespace]);
        self.cluster.apply(namespace, &example("quickstart/volumes.yaml"));
    }

    pub fn get<K: Object>(&self, namespace: &str, name: &str) -> K {
        self.cluster.block_on(self.api(namespace).get(name)).unwrap()
    }

    pub fn list<K: Object>(&self, namespace: &str) -> Vec<K> {
        self.cluster.block_on(self.api::<K>(namespace).list(&ListParams::default())).unwrap().items
    }

    /// Changes an object as `kubectl patch --type merge` does.
    pub fn patch<K: Object>(&self, namespace: &str, name: &str, patch: Value) -> K {
        self.cluster.block_on(self.api(namespace).patch(name, &PatchParams::default(), &Patch::Merge(patch))).unwrap()
    }

    /// Waits until the object's condition is so.
    pub fn until<K: Object + Conditions>(&self, namespace: &str, name: &str, type_: &str, status: &str, reason: &str) -> K {
        let api = self.api::<K>(namespace);
        self.cluster.eventually(&format!("{namespace}/{name} is {type_}={status} {reason}"), async || {
            let object = api.get(name).await.ok()?;
            let condition = object.conditions().iter().find(|condition| condition.type_ == type_)?.clone();
            (condition.status == status && condition.reason == reason).then_some(object)
        })
    }

    /// Waits until an object is as it should be.
    pub fn until_is<K: Object>(&self, namespace: &str, name: &str, what: &str, holds: &dyn Fn(&K) -> bool) -> K {
        let api = self.api::<K>(namespace);
        let what = format!("{} {namespace}/{name} {what}", K::kind(&()));
        self.cluster.eventually(&what, async || api.get(name).await.ok().filter(holds))
    }

    /// Applies what a definition that was just changed allows, once the API server knows of the change.
    pub fn apply_once_allowed(&self, namespace: &str, manifest: &str) {
        let file = std::env::temp_dir().join(format!("carryon-manifest-{}.yaml", std::process::id()));
        std::fs::write(&file, manifest).unwrap();
        let apply = || self.cluster.command("kubectl").args(["--namespace", namespace, "apply", "--filename"]).arg(&file).output().unwrap();
        self.cluster.eventually("the change is known", async || apply().status.success().then_some(()));
        std::fs::remove_file(&file).unwrap();
    }

    /// Once the operator has done what there was to do, it writes no more.
    pub fn quiet(&self) {
        let mut before = self.written();
        self.cluster.eventually("four seconds in which the operator writes nothing", async || {
            tokio::time::sleep(Duration::from_secs(4)).await;
            let now = self.written();
            let rests = now == before;
            before = now;
            rests.then_some(())
        });
    }

    /// The operator's requests that wrote or tried to, by the API server's own word. Its Lease it writes at rest too.
    pub fn written(&self) -> Vec<AuditEntry> {
        let ours = agent("");
        let of_operator = |entry: &AuditEntry| entry.user == ACCOUNT && entry.user_agent.ends_with(&ours) && entry.resource != "leases";
        self.cluster.audit().into_iter().filter(of_operator).collect()
    }

    /// None of the operator's writes was refused, but for the few that lose a race and are made again: to make or change what another has made
    /// or changed since the look (409); to delete, let go of (a pod), or write the status of, what has gone since (404). What an operator that is ended waits for no
    /// more is no refusal (504).
    pub fn no_refused_writes(&self) {
        let written = self.written();
        let lets_go = |entry: &AuditEntry| entry.verb == "patch" && entry.resource == "pods";
        let ends = |entry: &AuditEntry| entry.verb == "delete" || entry.subresource == "status" || lets_go(entry);
        let raced = |entry: &&AuditEntry| matches!(entry.code, 409 | 504) || (entry.code == 404 && ends(entry));
        let (races, refused): (Vec<_>, Vec<_>) = written.iter().filter(|entry| entry.code >= 400).partition(raced);
        assert!(refused.is_empty(), "{refused:#?}");
        assert!(races.len() <= 1 + written.len() / 10, "{} of {} writes lost a race: {races:#?}", races.len(), written.len());
    }

    /// Waits until the quick start serves.
    pub fn until_served(&self, namespace: &str) -> CarryOnDeployment {
        self.until(namespace, "quickstart", READY, "True", "Serving")
    }
}

pub trait Conditions {
    fn conditions(&self) -> &[Condition];

    fn message(&self, type_: &str) -> String {
        self.conditions().iter().find(|condition| condition.type_ == type_).map(|condition| condition.message.clone()).unwrap_or_default()
    }
}

macro_rules! conditions {
    ($($kind:ty),*) => {
        $(impl Conditions for $kind {
            fn conditions(&self) -> &[Condition] {
                self.status.as_ref().map_or(&[], |status| &status.conditions)
            }
        })*
    };
}
conditions!(BaseModelPool, CarryOnJob, CarryOnDeployment);

/// Everything in a namespace that is ours or made for us, without what differs from run to run: names that were drawn, identifiers, times.
pub fn picture(world: &World, namespace: &str) -> Value {
    let kinds = "basemodelpools,carryonjobs,carryondeployments,statefulsets,deployments,replicasets,jobs,pods,services,configmaps,poddisruptionbudgets,networkpolicies";
    let all = world.cluster.kubectl(&["--namespace", namespace, "get", kinds, "--output", "json"]);
    let all: Value = serde_json::from_str(&all).unwrap();
    let mut picture: BTreeMap<String, Vec<Value>> = BTreeMap::new();
    for item in all["items"].as_array().unwrap() {
        let metadata = &item["metadata"];
        if metadata["name"] == "kube-root-ca.crt" {
            continue;
        }
        let owners: Vec<Value> = metadata["ownerReferences"].as_array().into_iter().flatten().map(|owner| owner["kind"].clone()).collect();
        let drawn = metadata.get("generateName").is_some() || item["kind"] == "ReplicaSet";
        let mut shown = json!({
            "name": if drawn { Value::Null } else { metadata["name"].clone() },
            "generation": metadata["generation"], "labels": metadata["labels"], "owners": owners,
            "spec": item["spec"], "data": item["data"], "status": item["status"],
        });
        scrub(&mut shown, namespace);
        name_without_digest(&mut shown);
        picture.entry(item["kind"].as_str().unwrap().to_owned()).or_default().push(shown);
    }
    json!(picture)
}

/// The end of a configuration's name is drawn from its content, which names the namespace.
fn name_without_digest(shown: &mut Value) {
    let short = |value: &mut Value| {
        if let Some((name, digest)) = value.as_str().and_then(|text| text.rsplit_once('-'))
            && digest.len() == 10
        {
            *value = json!(name);
        }
    };
    if !shown["data"].is_null() {
        short(&mut shown["name"]);
    }
    for pod in ["/spec/volumes", "/spec/template/spec/volumes"] {
        let volumes = shown.pointer_mut(pod).and_then(Value::as_array_mut).into_iter().flatten();
        volumes.filter_map(|volume| volume.pointer_mut("/configMap/name")).for_each(short);
    }
}

/// Takes out what differs from run to run.
fn scrub(value: &mut Value, namespace: &str) {
    const DRAWN: [&str; 14] = [
        "uid",
        "jobUid",
        "resourceVersion",
        "controller-uid",
        "batch.kubernetes.io/controller-uid",
        "pod-template-hash",
        "clusterIP",
        "clusterIPs",
        "containerID",
        "controller-revision-hash",
        "currentRevision",
        "updateRevision",
        "collisionCount",
        // Of texts that name the namespace.
        names::CONFIG_DIGEST_ANNOTATION,
    ];
    match value {
        Value::Object(members) => {
            members.retain(|key, _| !DRAWN.contains(&key.as_str()) && !key.ends_with("Time") && !key.ends_with("At"));
            members.values_mut().for_each(|member| scrub(member, namespace));
        }
        Value::Array(items) => items.iter_mut().for_each(|item| scrub(item, namespace)),
        Value::String(text) if text.starts_with("ReplicaSet ") => text.clear(),
        Value::String(text) => *text = text.replace(namespace, "NAMESPACE"),
        _ => {}
    }
}
