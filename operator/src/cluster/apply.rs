//! The only writer of children.

use std::fmt::Debug;
use std::sync::Arc;

use carryon_crds::{names, wire};
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
use super::written::Written;
use crate::shared::Refusal;
use crate::shared::text::{WORDS, bounded};

/// Why a child is not as it should be.
#[derive(Debug)]
pub enum Unapplied {
    /// The user, or somebody with more rights than we have, must change something.
    Refused(Refusal),
    /// Worth another try.
    Failed(Failure),
}

/// What was applied, or the refusal that becomes the object's conditions.
///
/// # Errors
/// What is worth another try.
pub fn settle<A>(applied: Result<A, Unapplied>) -> Result<Result<A, Refusal>, Failure> {
    match applied {
        Ok(applied) => Ok(Ok(applied)),
        Err(Unapplied::Refused(refusal)) => Ok(Err(refusal)),
        Err(Unapplied::Failed(failure)) => Err(failure),
    }
}

impl From<Failure> for Unapplied {
    fn from(failure: Failure) -> Self {
        Self::Failed(failure)
    }
}

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
    Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + Debug + Serialize + DeserializeOwned + Send + 'static
{
}
impl<K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + Debug + Serialize + DeserializeOwned + Send + 'static> Child
    for K
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

    async fn patch<K: Child>(&self, wanted: &Wanted<K>, force: bool) -> kube::Result<K> {
        let parameters = PatchParams { force, ..PatchParams::apply(names::MANAGER) };
        self.api(&wanted.object).patch(&wanted.object.name_any(), &parameters, &Patch::Apply(&wanted.value)).await
    }

    async fn replace_lists<K: Child>(&self, wanted: &Wanted<K>) -> kube::Result<K> {
        let parameters = PatchParams { field_manager: Some(names::MANAGER.to_owned()), ..PatchParams::default() };
        self.api(&wanted.object).patch(&wanted.object.name_any(), &parameters, &Patch::Merge(&wanted.value)).await
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
    /// # Errors
    /// A child of that name that is not ours; a request that the cluster refuses or cannot answer.
    pub async fn apply<K: Child>(&self, wanted: K, present: Option<K>) -> Result<K, Unapplied> {
        let wanted = Wanted::new(wanted);
        if let Some(present) = &present {
            if present.meta().deletion_timestamp.is_some() {
                return Ok(present.clone());
            }
            ours(&wanted.object, present)?;
            if wanted.is_met_by(present) {
                return Ok(present.clone());
            }
        }
        if let Some(answer) = self.applier.written.answer(&wanted.object, &wanted.digest, present.as_ref()) {
            return Ok(answer);
        }
        let applied = match &present {
            Some(_) => match self.applier.patch(&wanted, true).await {
                // Server-side apply adds our items to lists that somebody has edited, and finds the same name twice in them. Then the lists are ours.
                Err(error) if code(&error) == 422 => self.applier.replace_lists(&wanted).await,
                patched => patched,
            },
            None => self.make(&wanted).await?,
        };
        let mut applied = applied.map_err(|error| failed("apply", &wanted.object, error))?;
        applied.managed_fields_mut().clear();
        self.applier.written.child(&applied, wanted.digest, present.as_ref().and_then(ResourceExt::resource_version));
        Ok(applied)
    }

    /// Makes a child that the cache does not hold.
    async fn make<K: Child>(&self, wanted: &Wanted<K>) -> Result<kube::Result<K>, Unapplied> {
        // Held until it is made.
        let _permit = self.applier.permit::<K>().await;
        self.lives().await?;
        match self.applier.patch(wanted, false).await {
            // Somebody else's fields are in the way, so it exists: whose is it?
            Err(error) if code(&error) == 409 => {
                let name = wanted.object.name_any();
                let present = self.applier.api(&wanted.object).get(&name).await.map_err(|error| failed("read", &wanted.object, error))?;
                ours(&wanted.object, &present)?;
                Ok(self.applier.patch(wanted, true).await)
            }
            made => Ok(made),
        }
    }

    /// Creates a training attempt, or finds the one that is there; it is never written again but to be adopted.
    ///
    /// # Errors
    /// As [`apply`](Self::apply).
    pub async fn create_once(&self, wanted: Job) -> Result<Job, Unapplied> {
        self.lives().await?;
        let api = self.applier.api::<Job>(&wanted);
        let parameters = PostParams { field_manager: Some(names::MANAGER.to_owned()), ..PostParams::default() };
        match api.create(&parameters, &wanted).await {
            Ok(job) => Ok(job),
            Err(error) if code(&error) == 409 => {
                let present = api.get(&wanted.name_any()).await.map_err(|error| failed("read", &wanted, error))?;
                ours(&wanted, &present)?;
                self.adopt(&wanted, present).await
            }
            Err(error) => Err(failed("create", &wanted, error)),
        }
    }

    /// Takes over a training attempt that has lost its owner, so that it is seen and goes when the new one goes.
    ///
    /// # Errors
    /// One that trains something else; a request that the cluster refuses or cannot answer.
    pub async fn adopt(&self, wanted: &Job, present: Job) -> Result<Job, Unapplied> {
        if is_controlled(&present) {
            return Ok(present);
        }
        let api = self.applier.api::<Job>(wanted);
        // Of the template, a cache holds nothing.
        let present = api.get(&present.name_any()).await.map_err(|error| failed("read", wanted, error))?;
        ours(wanted, &present)?;
        same_configuration(wanted, &present)?;
        let owners = [present.owner_references(), wanted.owner_references()].concat();
        let patch = json!({ "metadata": { "resourceVersion": present.resource_version(), "ownerReferences": owners } });
        let adopted = api.patch(&present.name_any(), &PatchParams::default(), &Patch::Merge(patch)).await;
        adopted.map_err(|error| failed("adopt", wanted, error))
    }

    /// Deletes a training attempt; it is gone only when its pod has ended, checkpoint written.
    ///
    /// # Errors
    /// When the cluster refuses or cannot answer.
    pub async fn delete(&self, job: &Job) -> Result<(), Unapplied> {
        self.remove(job, PropagationPolicy::Foreground).await
    }

    /// Deletes those of `present` that no pod needs any more: all but the one called `current`.
    ///
    /// # Errors
    /// When the cluster refuses or cannot answer.
    pub async fn collect<K: Child>(&self, present: Vec<K>, current: &str) -> Result<(), Unapplied> {
        for child in present.iter().filter(|child| child.name_any() != current && child.meta().deletion_timestamp.is_none()) {
            self.remove(child, PropagationPolicy::Background).await?;
        }
        Ok(())
    }

    async fn remove<K: Child>(&self, child: &K, policy: PropagationPolicy) -> Result<(), Unapplied> {
        let preconditions = Some(Preconditions { uid: child.uid(), resource_version: None });
        let parameters = DeleteParams { propagation_policy: Some(policy), preconditions, ..DeleteParams::default() };
        match self.applier.api::<K>(child).delete(&child.name_any(), &parameters).await {
            Ok(_) => Ok(()),
            Err(error) if [404, 409].contains(&code(&error)) => Ok(()),
            Err(error) => Err(failed("delete", child, error)),
        }
    }

    /// Before something is made that is not there. Where an object goes, its children go with it, and the caches hear of that in no order:
    /// the one of an object that was looked at before may be behind, and the API server is asked.
    async fn lives(&self) -> Result<(), Unapplied> {
        if self.owner.status().is_none() {
            return Ok(());
        }
        let ask = async || {
            let found = self.applier.api(self.owner).get_metadata_opt(&self.owner.name_any()).await;
            let found = found.map_err(|error| failed("read", self.owner, error))?.map(|found| found.metadata);
            let lives = found.is_some_and(|found| found.uid == self.owner.meta().uid && found.deletion_timestamp.is_none());
            if lives { Ok(()) } else { Err(Unapplied::Failed(Failure::Deleted)) }
        };
        self.lives.get_or_try_init(ask).await.copied()
    }
}

/// Whether an object has an owner that looks after it.
pub fn is_controlled<K: Resource>(object: &K) -> bool {
    object.owner_references().iter().any(|owner| owner.controller == Some(true))
}

/// Refuses an attempt that an earlier object of that name has left behind, when it trains something else.
fn same_configuration(wanted: &Job, present: &Job) -> Result<(), Refusal> {
    let digest = |job: &Job| {
        let template = job.spec.as_ref()?.template.metadata.as_ref()?;
        template.annotations.as_ref()?.get(names::CONFIG_DIGEST_ANNOTATION).cloned()
    };
    if digest(wanted) == digest(present) {
        return Ok(());
    }
    let path = format!("{}/{}", present.namespace().unwrap_or_default(), present.name_any());
    Err(Refusal::permanent("ChildTaken", format!("Job {path} was left behind with another configuration: delete it")))
}

/// Refuses an object that another one controls, or that has nothing to do with us.
fn ours<K: Child>(wanted: &K, present: &K) -> Result<(), Refusal> {
    let controller = |object: &K| object.owner_references().iter().find(|owner| owner.controller == Some(true)).cloned();
    let thing = format!("{} {}/{}", K::kind(&()), present.namespace().unwrap_or_default(), present.name_any());
    match (controller(wanted), controller(present)) {
        (Some(wanted), Some(present)) if wanted.uid == present.uid => Ok(()),
        (Some(wanted), Some(present)) if wanted.kind == present.kind && wanted.name == present.name => {
            let message = format!("{thing} belongs to an earlier {} {} and is still being deleted", present.kind, present.name);
            Err(Refusal::waiting("ChildBeingDeleted", message))
        }
        (_, Some(present)) => {
            let message = format!("{thing} belongs to {} {}: delete it or rename this object", present.kind, present.name);
            Err(Refusal::permanent("ChildTaken", message))
        }
        // Left behind by a deletion that orphans children: taken over.
        (_, None) if present.labels().get("app.kubernetes.io/managed-by").is_some_and(|manager| manager == names::MANAGER) => Ok(()),
        (_, None) => Err(Refusal::permanent("ChildTaken", format!("{thing} is not ours: delete it or rename this object"))),
    }
}

impl From<Refusal> for Unapplied {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

/// What the cluster refuses for good becomes a condition; all else is tried again.
fn failed<K: Child>(step: &'static str, object: &K, error: kube::Error) -> Unapplied {
    let what = format!("{} {}/{}", K::kind(&()), object.namespace().unwrap_or_default(), object.name_any());
    let said = match &error {
        kube::Error::Api(status) => bounded(&status.message, WORDS),
        other => other.to_string(),
    };
    if let Some(webhook) = silent_webhook(&said).filter(|_| code(&error) == 500) {
        let message = format!("cannot {step} {what}: the admission webhook {webhook} does not answer");
        return Unapplied::Refused(Refusal::waiting("WebhookUnavailable", message));
    }
    match code(&error) {
        403 if said.contains("being terminated") => {
            Unapplied::Refused(Refusal::waiting("NamespaceTerminating", "the namespace is being deleted"))
        }
        403 => Unapplied::Refused(Refusal::waiting(
            "Forbidden",
            format!("may not {step} {what}: {said}; give the operator the permission, or the namespace the quota"),
        )),
        400 | 422 => Unapplied::Refused(Refusal::waiting("Rejected", format!("cannot {step} {what}: {said}"))),
        _ => Unapplied::Failed(Failure::Api { step, what, source: Box::new(error) }),
    }
}

/// The webhook that the API server could not ask. What it says beyond the name may differ from time to time, and has no place in a status.
fn silent_webhook(said: &str) -> Option<&str> {
    let (_, after) = said.split_once("failed calling webhook \"")?;
    after.split_once('"').map(|(name, _)| name)
}
