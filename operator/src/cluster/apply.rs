//! The only writer of children.

use std::fmt::Debug;
use std::sync::Arc;

use carryon_crds::{names, wire};
use futures::future::BoxFuture;
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::batch::v1::Job;
use kube::api::{DeleteParams, Patch, PatchParams, PostParams, Preconditions, PropagationPolicy};
use kube::core::object::HasStatus;
use kube::{Api, Client, Resource, ResourceExt};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::sync::{OnceCell, Semaphore, SemaphorePermit};

use super::covers::covers;
use super::failure::{Failure, code};
use super::ownership::{controller, ours, same_configuration};
use super::written::Written;

/// Services that are made at the same time. An API server gives them their addresses one by one: more would wait there, in the way of all else.
const SERVICES: usize = 4;

/// Writes children by server-side apply, and only when something would change.
pub struct Applier {
    client: Client,
    written: Arc<Written>,
    /// Held while a Service is made.
    services: Semaphore,
}

/// The writer of the children of one object.
pub struct Owned<'a, O> {
    applier: &'a Applier,
    owner: &'a O,
    /// Set when the API server has said that the owner is there.
    lives: OnceCell<()>,
}

/// A child as it is to be; its digest is in an annotation.
struct Wanted<K> {
    object: K,
    value: Value,
    digest: String,
}

impl<K: Child> Wanted<K> {
    fn new(mut object: K) -> Self {
        let digest = wire::digest(serde_json::to_string(&object).expect("a child is JSON").as_bytes());
        object.annotations_mut().insert(names::APPLIED_ANNOTATION.to_owned(), digest.clone());
        let value = serde_json::to_value(&object).expect("a child is JSON");
        Self { object, value, digest }
    }

    /// Whether there is nothing to write: this was applied, and nobody has changed it since.
    fn is_met_by(&self, present: &K) -> bool {
        let same = present.annotations().get(names::APPLIED_ANNOTATION) == Some(&self.digest);
        same && covers(&serde_json::to_value(present).expect("a child is JSON"), &self.value)
    }
}

/// What a child is, in Rust.
pub trait Child:
    Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + Debug + Serialize + DeserializeOwned + Send + Sync + 'static
{
}
impl<K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + Debug + Serialize + DeserializeOwned + Send + Sync + 'static>
    Child for K
{
}

impl Applier {
    /// Remembers in `written` what the caches are still to see.
    pub fn new(client: Client, written: Arc<Written>) -> Self {
        Self { client, written, services: Semaphore::new(SERVICES) }
    }

    /// The writer of the children of `owner`.
    pub fn of<'a, O>(&'a self, owner: &'a O) -> Owned<'a, O> {
        Owned { applier: self, owner, lives: OnceCell::new() }
    }

    /// Makes or changes a child; with `force`, over what others have written into our fields.
    async fn patch<K: Child>(&self, wanted: &Wanted<K>, force: bool) -> kube::Result<K> {
        let parameters = PatchParams { force, ..PatchParams::apply(names::MANAGER) };
        self.api(&wanted.object).patch(&wanted.object.name_any(), &parameters, &Patch::Apply(&wanted.value)).await
    }

    async fn change<K: Child>(&self, wanted: &Wanted<K>) -> kube::Result<K> {
        match self.patch(wanted, true).await {
            // Server-side apply adds our items to lists that somebody has edited, and finds the same name twice in them. Then the lists are ours.
            Err(error) if code(&error) == 422 => {
                let parameters = PatchParams { field_manager: Some(names::MANAGER.to_owned()), ..PatchParams::default() };
                self.api(&wanted.object).patch(&wanted.object.name_any(), &parameters, &Patch::Merge(&wanted.value)).await
            }
            patched => patched,
        }
    }

    /// Deletes an object, when it is the very one, and in this version if one is named.
    ///
    /// # Errors
    /// What is worth another try; none when it is gone or another already.
    pub async fn delete<K: Child>(&self, object: &K, version: Option<String>, policy: PropagationPolicy) -> Result<(), Failure> {
        let preconditions = Some(Preconditions { uid: object.uid(), resource_version: version });
        let parameters = DeleteParams { propagation_policy: Some(policy), preconditions, ..DeleteParams::default() };
        match self.api(object).delete(&object.name_any(), &parameters).await {
            Err(error) if ![404, 409].contains(&code(&error)) => Err(Failure::of_child("delete", object)(error)),
            _ => Ok(()),
        }
    }

    /// Waits until an object of this type may be made.
    async fn permit<K: Child>(&self) -> Option<SemaphorePermit<'_>> {
        if K::kind(&()) == "Service" { self.services.acquire().await.ok() } else { None }
    }

    fn api<K: Child>(&self, object: &K) -> Api<K> {
        Api::namespaced(self.client.clone(), &object.namespace().unwrap_or_default())
    }
}

impl<O: Child + HasStatus> Owned<'_, O> {
    /// Makes `wanted` so; `present` is what the cache holds of it. The object as the cluster holds it now.
    ///
    /// It is boxed: who awaits one for each type of child would need room for all of them, and again in each who awaits him; without
    /// optimisation that is more than a thread's stack.
    ///
    /// # Errors
    /// A child of that name that is not ours; a request that the cluster refuses or cannot answer.
    pub fn apply<K: Child>(&self, wanted: K, present: Option<K>) -> BoxFuture<'_, Result<K, Failure>> {
        Box::pin(self.apply_one(wanted, present))
    }

    async fn apply_one<K: Child>(&self, wanted: K, present: Option<K>) -> Result<K, Failure> {
        let wanted = Wanted::new(wanted);
        if let Some(present) = &present {
            ours(&wanted.object, present)?;
            if present.meta().deletion_timestamp.is_some() || wanted.is_met_by(present) {
                return Ok(present.clone());
            }
        }
        let written = &self.applier.written;
        if let Some(answer) = written.answer(&wanted.object, &wanted.digest, present.as_ref()) {
            return Ok(answer);
        }
        let mut applied = match &present {
            Some(_) => self.applier.change(&wanted).await.map_err(Failure::of_child("apply", &wanted.object))?,
            None => self.make(&wanted).await?,
        };
        applied.managed_fields_mut().clear();
        written.child(&applied, wanted.digest, present.as_ref().and_then(ResourceExt::resource_version));
        Ok(applied)
    }

    /// Makes a child that the cache does not hold.
    async fn make<K: Child>(&self, wanted: &Wanted<K>) -> Result<K, Failure> {
        // Held until it is made.
        let _permit = self.applier.permit::<K>().await;
        self.lives().await?;
        let made = match self.applier.patch(wanted, false).await {
            // Somebody else's fields are in the way, so it exists: whose is it?
            Err(error) if code(&error) == 409 => {
                ours(&wanted.object, &self.read(&wanted.object).await?)?;
                self.applier.patch(wanted, true).await
            }
            made => made,
        };
        made.map_err(Failure::of_child("apply", &wanted.object))
    }

    /// The API server's word on a child.
    async fn read<K: Child>(&self, child: &K) -> Result<K, Failure> {
        self.applier.api(child).get(&child.name_any()).await.map_err(Failure::of_child("read", child))
    }

    /// Creates a training attempt, or finds the one that is there; it is never written again but to be adopted.
    ///
    /// # Errors
    /// As [`apply`](Self::apply).
    pub async fn create_once(&self, wanted: Job) -> Result<Job, Failure> {
        self.lives().await?;
        let parameters = PostParams { field_manager: Some(names::MANAGER.to_owned()), ..PostParams::default() };
        match self.applier.api(&wanted).create(&parameters, &wanted).await {
            Err(error) if code(&error) == 409 => {
                let present = self.read(&wanted).await?;
                ours(&wanted, &present)?;
                self.adopt(&wanted, present).await
            }
            created => created.map_err(Failure::of_child("create", &wanted)),
        }
    }

    /// Takes over a training attempt that has lost its owner, so that it is seen and goes when the new one goes.
    ///
    /// # Errors
    /// One that trains something else; a request that the cluster refuses or cannot answer.
    pub async fn adopt(&self, wanted: &Job, present: Job) -> Result<Job, Failure> {
        if controller(&present).is_some() {
            return Ok(present);
        }
        // Of the template, a cache holds nothing.
        let present = self.read(wanted).await?;
        ours(wanted, &present)?;
        same_configuration(wanted, &present)?;
        let owners = [present.owner_references(), wanted.owner_references()].concat();
        let patch = json!({ "metadata": { "resourceVersion": present.resource_version(), "ownerReferences": owners } });
        let adopted = self.applier.api(wanted).patch(&wanted.name_any(), &PatchParams::default(), &Patch::Merge(patch)).await;
        adopted.map_err(Failure::of_child("adopt", wanted))
    }

    /// Deletes a training attempt; it is gone only when its pod has ended, checkpoint written.
    pub async fn delete(&self, job: &Job) -> Result<(), Failure> {
        self.applier.delete(job, None, PropagationPolicy::Foreground).await
    }

    /// Deletes those of `present` that no pod needs any more: all but the one called `current`.
    pub async fn collect<K: Child>(&self, present: Vec<K>, current: &str) -> Result<(), Failure> {
        for child in present.iter().filter(|child| child.name_any() != current && child.meta().deletion_timestamp.is_none()) {
            self.applier.delete(child, None, PropagationPolicy::Background).await?;
        }
        Ok(())
    }

    /// Before something is made that is not there. Where an object goes, its children go with it, and the caches hear of that in no order:
    /// the one of an object that was looked at before may be behind, and the API server is asked.
    async fn lives(&self) -> Result<(), Failure> {
        if self.owner.status().is_none() {
            return Ok(());
        }
        let ask = async || {
            let found = self.applier.api(self.owner).get_metadata_opt(&self.owner.name_any()).await;
            let found = found.map_err(Failure::of_child("read", self.owner))?.map(|found| found.metadata);
            let lives = found.is_some_and(|found| found.uid == self.owner.meta().uid && found.deletion_timestamp.is_none());
            if lives { Ok(()) } else { Err(Failure::Deleted) }
        };
        self.lives.get_or_try_init(ask).await.copied()
    }
}
