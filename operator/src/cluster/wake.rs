//! Who has to be reconciled: from a change to the keys of the objects that it concerns. Pure.

use carryon_crds::common::ClaimPath;
use carryon_crds::condition::types::READY;
use carryon_crds::condition::{ObservedStatus, is_true};
use carryon_crds::{BaseModelPool, CarryOnDeployment, CarryOnJob, GROUP, names};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Resource;
use kube::core::object::HasStatus;

use super::key::{Key, Kind};
use super::queue::Lane;
use super::store::{Cache, Guarded, Stores};
use super::watch::Change;
use crate::deployment::{referenced_claims, referenced_jobs, refers_to};
use crate::shared::sharing::{PoolPath, PoolUser};

/// Keys to put into the queue, in that order.
pub fn keys(change: &Change<'_>, stores: &Stores) -> Vec<(Key, Lane)> {
    match change {
        Change::Pool(pool) => {
            let users = [users(Kind::Job, &stores.jobs, pool.meta()), users(Kind::Deployment, &stores.deployments, pool.meta())].concat();
            [vec![itself(Kind::Pool, *pool)], users].concat()
        }
        Change::Job(job) => {
            let (namespace, name) = path(job.meta());
            [vec![itself(Kind::Job, *job)], deployments(stores, namespace, |deployment| refers_to(deployment, name))].concat()
        }
        // Jobs wait for the deployments that serve their heads before they are deleted.
        Change::Deployment(deployment) => {
            let (namespace, _) = path(deployment.meta());
            let expires = |job: &CarryOnJob| job.spec.ttl_seconds_after_finished.is_some();
            [vec![itself(Kind::Deployment, *deployment)], jobs(stores, namespace, expires)].concat()
        }
        Change::Child(child) => owners(child),
        Change::Claim(claim) => users_of_claim(stores, claim),
        Change::Node => {
            let lacks = |pool: &BaseModelPool| pool.status.as_ref().is_none_or(|status| !is_true(&status.conditions, READY));
            stores.pools.list(lacks).iter().map(|pool| (Key::of(Kind::Pool, pool), Lane::Around)).collect()
        }
        // Its labels say which pools are shared with it.
        Change::Namespace(namespace) => {
            let (_, name) = path(namespace);
            let trains = |job: &CarryOnJob| job.pools().iter().any(PoolPath::is_elsewhere);
            let serves = |deployment: &CarryOnDeployment| deployment.pools().iter().any(PoolPath::is_elsewhere);
            [jobs(stores, name, trains), deployments(stores, name, serves)].concat()
        }
        Change::Listed => {
            let pools = stores.pools.all().into_iter().map(|pool| itself(Kind::Pool, &pool));
            let jobs = stores.jobs.all().into_iter().map(|job| itself(Kind::Job, &job));
            let deployments = stores.deployments.all().into_iter().map(|deployment| itself(Kind::Deployment, &deployment));
            // The job of a pod that leaves may have gone while nobody watched.
            let pods = stores.pods.all();
            let leaving = pods.iter().filter(|pod| pod.meta().deletion_timestamp.is_some()).flat_map(|pod| owners(pod.meta()));
            pools.chain(jobs).chain(deployments).chain(leaving).collect()
        }
    }
}

/// The object itself: ahead of the others when its status does not speak of its spec.
fn itself<K>(kind: Kind, object: &Guarded<K>) -> (Key, Lane)
where
    K: Resource<DynamicType = ()> + HasStatus<Status: ObservedStatus>,
{
    let observed = |object: &K| object.status().and_then(ObservedStatus::observed_generation);
    let is_new = object.0.as_ref().is_ok_and(|object| observed(object) != object.meta().generation);
    (Key::of(kind, object), if is_new { Lane::NewSpec } else { Lane::Around })
}

/// Whose child it is, by its owner or by its labels, which a pod has too and which outlive an owner.
fn owners(child: &ObjectMeta) -> Vec<(Key, Lane)> {
    let (namespace, _) = path(child);
    let label = |key: &str| child.labels.as_ref().and_then(|labels| labels.get(key)).map(String::as_str);
    let labelled = |kind: &Kind| label(names::COMPONENT_LABEL) == Some(kind.component());
    let owned = child.owner_references.iter().flatten().filter(|owner| owner.api_version.starts_with(GROUP));
    let mut owners: Vec<(Kind, &str)> =
        owned.filter_map(|owner| Some((Kind::ALL.into_iter().find(|kind| kind.name() == owner.kind)?, owner.name.as_str()))).collect();
    owners.extend(Kind::ALL.into_iter().find(labelled).zip(label(names::INSTANCE_LABEL)));
    owners.dedup();
    owners.into_iter().map(|(kind, name)| (Key { kind, namespace: namespace.to_owned(), name: name.to_owned() }, Lane::Around)).collect()
}

/// Those of a kind that name the pool.
fn users<K>(kind: Kind, cache: &Cache<Guarded<K>>, pool: &ObjectMeta) -> Vec<(Key, Lane)>
where
    K: Resource<DynamicType = ()> + PoolUser + Clone + 'static,
{
    let (namespace, name) = path(pool);
    cache.users_of(namespace, name).iter().map(|user| (Key::of(kind, &**user), Lane::Around)).collect()
}

/// Everybody whose spec names the claim.
fn users_of_claim(stores: &Stores, claim: &ObjectMeta) -> Vec<(Key, Lane)> {
    let (namespace, name) = path(claim);
    let names = |path: &ClaimPath| path.claim_name == name;
    let loads = |pool: &BaseModelPool| pool.spec.model.claim().is_some_and(|(claim, _)| names(claim));
    let trains = |job: &CarryOnJob| job.spec.claims().any(names);
    let serves = |deployment: &CarryOnDeployment| {
        let jobs: Vec<_> = referenced_jobs(deployment).filter_map(|job| stores.jobs.get(namespace, job)).collect();
        referenced_claims(deployment, &jobs).iter().any(|claim| claim == name)
    };
    let pools = around(Kind::Pool, namespace, stores.pools.names_of(namespace, loads));
    [pools, jobs(stores, namespace, trains), deployments(stores, namespace, serves)].concat()
}

fn jobs(stores: &Stores, namespace: &str, concerns: impl Fn(&CarryOnJob) -> bool) -> Vec<(Key, Lane)> {
    around(Kind::Job, namespace, stores.jobs.names_of(namespace, concerns))
}

fn deployments(stores: &Stores, namespace: &str, concerns: impl Fn(&CarryOnDeployment) -> bool) -> Vec<(Key, Lane)> {
    around(Kind::Deployment, namespace, stores.deployments.names_of(namespace, concerns))
}

fn around(kind: Kind, namespace: &str, names: Vec<String>) -> Vec<(Key, Lane)> {
    names.into_iter().map(|name| (Key { kind, namespace: namespace.to_owned(), name }, Lane::Around)).collect()
}

fn path(metadata: &ObjectMeta) -> (&str, &str) {
    (metadata.namespace.as_deref().unwrap_or_default(), metadata.name.as_deref().unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use kube::runtime::watcher::Event;
    use serde::de::DeserializeOwned;
    use serde_json::{Value, json};

    use super::*;

    fn object<T: DeserializeOwned>(namespace: &str, name: &str, mut rest: Value) -> T {
        let metadata = &mut rest["metadata"];
        metadata["namespace"] = json!(namespace);
        metadata["name"] = json!(name);
        serde_json::from_value(rest).unwrap()
    }

    fn pool(namespace: &str, name: &str, claim: &str, conditions: Value) -> Guarded<BaseModelPool> {
        let spec = json!({ "model": { "source": { "persistentVolumeClaim": { "claimName": claim } } } });
        object(namespace, name, json!({ "spec": spec, "status": { "conditions": conditions } }))
    }

    fn job(name: &str, rest: Value) -> Guarded<CarryOnJob> {
        let mut spec = json!({
            "pools": [{ "name": "base" }],
            "data": { "source": { "configMap": { "name": "samples" } }, "split": { "train": ["train.jsonl"] } },
            "output": { "destination": { "persistentVolumeClaim": { "claimName": "results" } } },
        });
        spec.as_object_mut().unwrap().extend(rest.as_object().unwrap().clone());
        object("team", name, json!({ "spec": spec }))
    }

    fn deployment(name: &str, job: &str) -> Guarded<CarryOnDeployment> {
        deployment_on(json!({ "name": "base" }), name, job)
    }

    fn deployment_on(pool: Value, name: &str, job: &str) -> Guarded<CarryOnDeployment> {
        let spec = json!({
            "pools": [pool],
            "heads": [{ "name": "one", "source": { "jobRef": { "name": job } } }],
            "api": { "keys": [{ "name": "one", "secretRef": { "name": "keys", "key": "key" } }] },
        });
        object("team", name, json!({ "spec": spec }))
    }

    /// A pool, two jobs that train on it, one of which expires, and the deployment of the other's head; a pool in another namespace, and a
    /// deployment that names it.
    fn stores() -> Stores {
        let stores = Stores::default();
        stores.pools.apply(&Event::Apply(pool("team", "base", "models", json!([]))));
        let time = "2026-01-01T00:00:00Z";
        let ready = json!([{ "type": "Ready", "status": "True", "reason": "Ready", "message": "", "lastTransitionTime": time }]);
        stores.pools.apply(&Event::Apply(pool("others", "base", "models", ready)));
        stores.jobs.apply(&Event::Apply(job("expires", json!({ "ttlSecondsAfterFinished": 60 }))));
        stores.jobs.apply(&Event::Apply(job("stays", json!({}))));
        stores.deployments.apply(&Event::Apply(deployment("chat", "stays")));
        stores.deployments.apply(&Event::Apply(deployment_on(json!({ "name": "base", "namespace": "others" }), "shared", "none")));
        stores
    }

    /// `Kind namespace/name`, sorted, with a mark at those that go ahead.
    fn woken(change: &Change<'_>) -> Vec<String> {
        let mark = |lane| if lane == Lane::NewSpec { " ahead" } else { "" };
        let mut keys: Vec<String> = keys(change, &stores()).into_iter().map(|(key, lane)| format!("{key}{}", mark(lane))).collect();
        keys.sort();
        keys
    }

    fn namespace(name: &str) -> ObjectMeta {
        serde_json::from_value(json!({ "name": name })).unwrap()
    }

    fn metadata(name: &str, rest: Value) -> ObjectMeta {
        let mut metadata = json!({ "namespace": "team", "name": name });
        metadata.as_object_mut().unwrap().extend(rest.as_object().unwrap().clone());
        serde_json::from_value(metadata).unwrap()
    }

    #[test]
    fn objects_concern_those_that_name_them() {
        let base = pool("team", "base", "models", json!([]));
        assert_eq!(
            woken(&Change::Pool(&base)),
            ["BaseModelPool team/base", "CarryOnDeployment team/chat", "CarryOnJob team/expires", "CarryOnJob team/stays"]
        );
        assert_eq!(
            woken(&Change::Pool(&pool("others", "base", "models", json!([])))),
            ["BaseModelPool others/base", "CarryOnDeployment team/shared"]
        );
        // Its labels may have changed, and with them what is shared with it.
        assert_eq!(woken(&Change::Namespace(&namespace("team"))), ["CarryOnDeployment team/shared"]);
        assert_eq!(woken(&Change::Namespace(&namespace("others"))), [""; 0]);
        assert_eq!(woken(&Change::Pool(&pool("elsewhere", "base", "models", json!([])))), ["BaseModelPool elsewhere/base"]);
        assert_eq!(woken(&Change::Job(&job("stays", json!({})))), ["CarryOnDeployment team/chat", "CarryOnJob team/stays"]);
        assert_eq!(woken(&Change::Job(&job("expires", json!({})))), ["CarryOnJob team/expires"]);
        // A job that expires waits until nobody serves its head.
        assert_eq!(woken(&Change::Deployment(&deployment("chat", "stays"))), ["CarryOnDeployment team/chat", "CarryOnJob team/expires"]);
        assert_eq!(woken(&Change::Claim(&metadata("models", json!({})))), ["BaseModelPool team/base"]);
        assert_eq!(woken(&Change::Claim(&metadata("results", json!({})))), ["CarryOnJob team/expires", "CarryOnJob team/stays"]);
        // A node may hold what had no room; the pool that is ready does not wait for one.
        assert_eq!(woken(&Change::Node), ["BaseModelPool team/base"]);
        assert_eq!(woken(&Change::Listed).len(), 6);
    }

    #[test]
    fn a_spec_that_no_status_speaks_of_goes_ahead() {
        let mut spec =
            json!({ "metadata": { "generation": 2 }, "spec": { "model": { "source": {} } }, "status": { "observedGeneration": 1 } });
        assert_eq!(woken(&Change::Pool(&object("new", "x", spec.clone()))), ["BaseModelPool new/x ahead"]);
        spec["status"]["observedGeneration"] = json!(2);
        assert_eq!(woken(&Change::Pool(&object("new", "x", spec))), ["BaseModelPool new/x"]);
        // What cannot be decoded is told of when its turn comes.
        assert_eq!(woken(&Change::Pool(&object("new", "x", json!({ "spec": 3 })))), ["BaseModelPool new/x"]);
    }

    #[test]
    fn children_concern_their_owner_by_reference_or_by_label() {
        let owner = |api: &str, kind: &str| json!([{ "apiVersion": api, "kind": kind, "name": "base", "uid": "1" }]);
        let labels = |component: &str| json!({ "app.kubernetes.io/component": component, "app.kubernetes.io/instance": "base" });
        let woken = |rest: Value| woken(&Change::Child(&metadata("child", rest)));
        let pool = owner("carryon.dev/v1alpha1", "BaseModelPool");
        assert_eq!(woken(json!({ "ownerReferences": pool })), ["BaseModelPool team/base"]);
        assert_eq!(woken(json!({ "ownerReferences": pool, "labels": labels("pool") })), ["BaseModelPool team/base"]);
        assert_eq!(
            woken(json!({ "ownerReferences": owner("apps/v1", "StatefulSet"), "labels": labels("trainer") })),
            ["CarryOnJob team/base"]
        );
        assert_eq!(woken(json!({ "labels": labels("gateway") })), ["CarryOnDeployment team/base"]);
        assert_eq!(woken(json!({ "ownerReferences": owner("apps/v1", "StatefulSet"), "labels": labels("operator") })), [""; 0]);
    }
}
