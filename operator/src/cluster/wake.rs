//! Who has to look again: from an object that changed to the objects of the three kinds that it concerns.

use carryon_crds::common::ClaimPath;
use carryon_crds::condition::is_true;
use carryon_crds::condition::types::READY;
use carryon_crds::{BaseModelPool, CarryOnDeployment, CarryOnJob};
use k8s_openapi::api::core::v1::{ConfigMap, PersistentVolumeClaim, Pod, Secret};
use kube::api::PartialObjectMeta;
use kube::{Resource, ResourceExt as _};

use super::caches::{Caches, Guarded};
use super::kinds::Kind;
use super::queue::Queue;
use crate::deployment::referenced_claim;

/// The queues of the three kinds.
#[derive(Clone)]
pub struct Wake {
    /// Pools to look at.
    pub pools: Queue<BaseModelPool>,
    /// Jobs to look at.
    pub jobs: Queue<CarryOnJob>,
    /// Deployments to look at.
    pub deployments: Queue<CarryOnDeployment>,
}

fn space<K: Resource>(object: &K) -> String {
    object.namespace().unwrap_or_default()
}

/// An object that changed itself, or may have: ahead of the others when nobody has looked at its spec.
fn own<K: Kind>(queue: &Queue<K>, object: &Guarded<K>) {
    let (space, name) = (space(object), object.name_any());
    let new = object.0.as_ref().is_ok_and(|object| object.status().and_then(K::observed_generation) != object.meta().generation);
    if new { queue.push_ahead(&space, &name) } else { queue.push(&space, &name) }
}

impl Wake {
    /// Everybody.
    pub fn all(&self, caches: &Caches) {
        caches.pools.store().state().iter().for_each(|pool| own(&self.pools, pool));
        caches.jobs.store().state().iter().for_each(|job| own(&self.jobs, job));
        caches.deployments.store().state().iter().for_each(|deployment| own(&self.deployments, deployment));
        // Their job may have gone while nobody watched.
        let leaving = |pod: &Guarded<Pod>| pod.meta().deletion_timestamp.is_some();
        caches.pods.store().state().iter().filter(|pod| leaving(pod)).for_each(|pod| self.instance(caches, pod));
    }

    /// A pool, the jobs that train on it and the deployments it serves.
    pub fn pool(&self, caches: &Caches, pool: &Guarded<BaseModelPool>) {
        let (space, name) = (space(pool), pool.name_any());
        own(&self.pools, pool);
        self.jobs_that(caches, &space, |job| job.spec.pools.iter().any(|pool| pool.name == name));
        self.deployments_that(caches, &space, |deployment| deployment.spec.pools.iter().any(|pool| pool.name == name));
    }

    /// The pools that lack pods.
    pub fn unready_pools(&self, caches: &Caches) {
        let lacks = |pool: &BaseModelPool| pool.status.as_ref().is_none_or(|status| !is_true(&status.conditions, READY));
        caches.pools.list(lacks).iter().for_each(|pool| self.pools.push(&space(pool), &pool.name_any()));
    }

    /// A job, and the deployments that serve its head.
    pub fn job(&self, caches: &Caches, job: &Guarded<CarryOnJob>) {
        let (space, name) = (space(job), job.name_any());
        own(&self.jobs, job);
        self.deployments_that(caches, &space, |deployment| refers_to(deployment, &name));
    }

    /// A deployment, and the jobs that wait for it before they are removed.
    pub fn deployment(&self, caches: &Caches, deployment: &Guarded<CarryOnDeployment>) {
        let space = space(deployment);
        own(&self.deployments, deployment);
        self.jobs_that(caches, &space, |job| job.spec.ttl_seconds_after_finished.is_some());
    }

    /// The object that controls a child.
    pub fn owner<K: Resource<DynamicType = ()>>(&self, _: &Caches, child: &Guarded<K>) {
        for owner in child.owner_references().iter().filter(|owner| owner.api_version.starts_with(carryon_crds::GROUP)) {
            match owner.kind.as_str() {
                "BaseModelPool" => self.pools.push(&space(child), &owner.name),
                "CarryOnJob" => self.jobs.push(&space(child), &owner.name),
                "CarryOnDeployment" => self.deployments.push(&space(child), &owner.name),
                _ => {}
            }
        }
    }

    /// The object that a pod's worker is of, or a training attempt: by their labels, which outlive their owner.
    pub fn instance<K: Resource<DynamicType = ()>>(&self, _: &Caches, child: &Guarded<K>) {
        let label = |key: &str| child.labels().get(key).map(String::as_str).unwrap_or_default();
        let name = label("app.kubernetes.io/instance");
        match label("app.kubernetes.io/component") {
            "pool" => self.pools.push(&space(child), name),
            "trainer" => self.jobs.push(&space(child), name),
            "gateway" => self.deployments.push(&space(child), name),
            _ => {}
        }
    }

    /// Everybody whose spec names the claim.
    pub fn users_of_claim(&self, caches: &Caches, claim: &PartialObjectMeta<PersistentVolumeClaim>) {
        let (space, name) = (space(claim), claim.name_any());
        let names = |path: &ClaimPath| path.claim_name == name;
        for pool in caches.pools.list(|pool| pool.namespace().unwrap_or_default() == space) {
            if pool.spec.model.source.persistent_volume_claim.as_ref().is_some_and(names) {
                self.pools.push(&space, &pool.name_any());
            }
        }
        self.jobs_that(caches, &space, |job| {
            names(&job.spec.output.persistent_volume_claim) || job.spec.data.source.persistent_volume_claim.as_ref().is_some_and(names)
        });
        self.deployments_that(caches, &space, |deployment| {
            let job = deployment.spec.head.job_ref.as_ref().and_then(|job| caches.jobs.get(&space, &job.name));
            referenced_claim(deployment, job.as_ref()).is_some_and(|claim| claim == name)
        });
    }

    /// The jobs whose data are in the ConfigMap. Our own are watched as children.
    pub fn users_of_data(&self, caches: &Caches, data: &PartialObjectMeta<ConfigMap>) {
        let name = data.name_any();
        self.jobs_that(caches, &space(data), |job| job.spec.data.source.config_map.as_ref().is_some_and(|source| source.name == name));
    }

    /// The deployments whose API key is in the Secret.
    pub fn users_of_secret(&self, caches: &Caches, secret: &PartialObjectMeta<Secret>) {
        let name = secret.name_any();
        self.deployments_that(caches, &space(secret), |deployment| {
            deployment.spec.api.key_secret_ref.as_ref().is_some_and(|key| key.name == name)
        });
    }

    fn jobs_that(&self, caches: &Caches, space: &str, concerns: impl Fn(&CarryOnJob) -> bool) {
        let jobs = caches.jobs.list(|job| job.namespace().as_deref() == Some(space) && concerns(job));
        jobs.iter().for_each(|job| self.jobs.push(space, &job.name_any()));
    }

    fn deployments_that(&self, caches: &Caches, space: &str, concerns: impl Fn(&CarryOnDeployment) -> bool) {
        let found = caches.deployments.list(|deployment| deployment.namespace().as_deref() == Some(space) && concerns(deployment));
        found.iter().for_each(|deployment| self.deployments.push(space, &deployment.name_any()));
    }
}

/// Whether the deployment's head is that of job `name`.
pub fn refers_to(deployment: &CarryOnDeployment, name: &str) -> bool {
    deployment.spec.head.job_ref.as_ref().is_some_and(|job| job.name == name)
}
