//! The watches: they fill the stores, and tell of every change.

use std::collections::BTreeSet;
use std::fmt::Debug;
use std::sync::Arc;

use carryon_crds::names::{COMPONENT_LABEL, MANAGER, MANAGER_LABEL, REVISION};
use carryon_crds::{BaseModelPool, CarryOnDeployment, CarryOnJob};
use futures::{Stream, StreamExt as _};
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{Container, Namespace, Node, NodeStatus, Pod, PodSpec, PodTemplateSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::PartialObjectMeta;
use kube::core::NamespaceResourceScope;
use kube::runtime::WatchStreamExt as _;
use kube::runtime::watcher::{self, Config, Event, watcher};
use kube::{Api, Client, Resource, ResourceExt as _};
use serde::de::DeserializeOwned;
use tokio::task::JoinSet;

use super::clients::WATCH;
use super::store::{Cache, Guarded, Stores};
use super::synced::Synced;
use super::tenure::ALL;
use super::written::Written;

/// Where `kubectl apply` keeps a copy of the whole object.
const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";

/// What has changed, been made or deleted.
pub enum Change<'a> {
    /// A pool.
    Pool(&'a Guarded<BaseModelPool>),
    /// A job.
    Job(&'a Guarded<CarryOnJob>),
    /// A deployment.
    Deployment(&'a Guarded<CarryOnDeployment>),
    /// A child of one of them, or a pod of such a child.
    Child(&'a ObjectMeta),
    /// A claim.
    Claim(&'a ObjectMeta),
    /// A node.
    Node,
    /// A namespace.
    Namespace(&'a ObjectMeta),
    /// Anything: a type was listed anew, and what was deleted while nobody watched has no change of its own.
    Listed,
}

/// Who is told of changes, when the stores have them.
pub type Listener = Arc<dyn Fn(&Change<'_>, &Stores) + Send + Sync>;

/// Starts all watches, of these namespaces or, when none is named, of all. They go on as long as the tasks are held; the stores are filled when `synced` says so.
pub fn start(
    client: &Client,
    namespaces: &[String],
    written: Arc<Written>,
    synced: Arc<Synced>,
    listener: Listener,
) -> (Arc<Stores>, JoinSet<String>) {
    let any = Config::default().timeout(WATCH);
    let labelled = |labels: String| any.clone().labels(&labels);
    let ours = format!("{MANAGER_LABEL}={MANAGER}");
    let (revisions, ours) = (labelled(format!("{ours},{COMPONENT_LABEL}={REVISION}")), labelled(ours));
    let whole_cluster = namespaces.is_empty();
    let stores = Stores { nodes: whole_cluster.then(Cache::default), namespaces: whole_cluster.then(Cache::default), ..Stores::default() };
    let stores = Arc::new(stores);
    let seen = Seen { stores: stores.clone(), written, synced, listener };
    let namespaces = if namespaces.is_empty() { BTreeSet::from([ALL]) } else { namespaces.iter().map(String::as_str).collect() };
    let mut watches = Watches { client, namespaces, seen, tasks: JoinSet::new() };
    watches.objects(|stores| &stores.pools, &any, whole, |pool| Change::Pool(pool));
    watches.objects(|stores| &stores.jobs, &any, whole, |job| Change::Job(job));
    watches.objects(|stores| &stores.deployments, &any, whole, |deployment| Change::Deployment(deployment));
    watches.objects(|stores| &stores.stateful_sets, &ours, whole, child);
    watches.objects(|stores| &stores.workloads, &ours, whole, child);
    watches.objects(|stores| &stores.attempts, &ours, without_template, child);
    watches.objects(|stores| &stores.pods, &ours, without_containers, child);
    watches.objects(|stores| &stores.services, &ours, whole, child);
    watches.objects(|stores| &stores.config_maps, &ours, whole, child);
    watches.objects(|stores| &stores.revisions, &revisions, whole, child);
    watches.objects(|stores| &stores.budgets, &ours, whole, child);
    watches.objects(|stores| &stores.policies, &ours, whole, child);
    watches.metadata(|stores| &stores.claims, &any, |claim| Change::Claim(&claim.metadata));
    watches.nodes(&any);
    watches.namespaces(&any);
    (stores, watches.tasks)
}

/// Where a type is kept.
type CacheOf<T> = fn(&Stores) -> &Cache<T>;
/// What a change of an object is.
type ChangeOf<T> = for<'a> fn(&'a T) -> Change<'a>;

/// One watch.
struct Watch<T: Resource<DynamicType = ()> + Clone + 'static> {
    /// Where.
    namespace: String,
    /// What it watches, for people.
    name: String,
    cache: CacheOf<T>,
    change: ChangeOf<T>,
}

/// What is done with what a watch shows.
#[derive(Clone)]
struct Seen {
    stores: Arc<Stores>,
    written: Arc<Written>,
    synced: Arc<Synced>,
    listener: Listener,
}

impl Seen {
    /// Enters what a watch shows. `list` is what its list that is not whole yet has shown, when that is of one namespace: it takes the place of
    /// what was shown there, and of nothing else.
    fn event<T: Resource<DynamicType = ()> + Clone + 'static>(&self, watch: &Watch<T>, list: &mut Vec<T>, event: &Event<T>) {
        let cache = (watch.cache)(&self.stores);
        match event {
            Event::Init if watch.namespace != ALL => list.clear(),
            Event::InitApply(object) if watch.namespace != ALL => list.push(object.clone()),
            Event::InitDone if watch.namespace != ALL => cache.listed(&watch.namespace, std::mem::take(list)),
            event => cache.apply(event),
        }
        match event {
            Event::Apply(object) => {
                self.written.seen(object);
                (self.listener)(&(watch.change)(object), &self.stores);
            }
            Event::Delete(object) => {
                self.written.gone(object);
                (self.listener)(&(watch.change)(object), &self.stores);
            }
            Event::InitDone => {
                self.written.listed::<T>(&watch.namespace);
                // What is woken looks whether its namespace was shown.
                self.synced.done(&watch.namespace, &watch.name);
                (self.listener)(&Change::Listed, &self.stores);
            }
            Event::Init | Event::InitApply(_) => {}
        }
    }
}

/// The watches that run.
struct Watches<'a> {
    client: &'a Client,
    namespaces: BTreeSet<&'a str>,
    seen: Seen,
    tasks: JoinSet<String>,
}

impl Watches<'_> {
    /// Objects of a type, of which only what `trim` leaves is kept.
    fn objects<K>(&mut self, cache: CacheOf<Guarded<K>>, config: &Config, trim: fn(&mut K), change: ChangeOf<Guarded<K>>)
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + DeserializeOwned + Debug + Send + Sync + 'static,
    {
        for namespace in self.namespaces.clone() {
            let api: Api<Guarded<K>> = self.api(namespace);
            let events = watcher(api, config.clone()).modify(move |object| object.0.iter_mut().for_each(trim));
            self.add(Watch { namespace: namespace.to_owned(), name: K::plural(&()).into_owned(), cache, change }, events);
        }
    }

    /// That objects of a type are there; their content never leaves the API server.
    fn metadata<K>(&mut self, cache: CacheOf<PartialObjectMeta<K>>, config: &Config, change: ChangeOf<PartialObjectMeta<K>>)
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + DeserializeOwned + Debug + Send + Sync + 'static,
    {
        for namespace in self.namespaces.clone() {
            let events = watcher(self.api::<PartialObjectMeta<K>>(namespace), config.clone());
            let name = format!("metadata of {}", K::plural(&()));
            self.add(Watch { namespace: namespace.to_owned(), name, cache, change }, events);
        }
    }

    fn nodes(&mut self, config: &Config) {
        if self.seen.stores.nodes.is_none() {
            return;
        }
        let api: Api<Guarded<Node>> = Api::all(self.client.clone());
        let events = watcher(api, config.clone()).modify(|node| node.0.iter_mut().for_each(allocatable));
        let cache: CacheOf<Guarded<Node>> = |stores| stores.nodes.as_ref().expect("nodes are watched when there is a cache");
        self.add(Watch { namespace: ALL.to_owned(), name: "nodes".to_owned(), cache, change: |_| Change::Node }, events);
    }

    fn namespaces(&mut self, config: &Config) {
        if self.seen.stores.namespaces.is_none() {
            return;
        }
        let api: Api<PartialObjectMeta<Namespace>> = Api::all(self.client.clone());
        let events = watcher(api, config.clone()).modify(|namespace| namespace.annotations_mut().clear());
        let cache: CacheOf<_> = |stores| stores.namespaces.as_ref().expect("namespaces are watched when there is a cache");
        let (namespace, name) = (ALL.to_owned(), "metadata of namespaces".to_owned());
        self.add(Watch { namespace, name, cache, change: |namespace| Change::Namespace(&namespace.metadata) }, events);
    }

    fn api<K: Resource<DynamicType = (), Scope = NamespaceResourceScope>>(&self, namespace: &str) -> Api<K> {
        match namespace {
            ALL => Api::all(self.client.clone()),
            namespace => Api::namespaced(self.client.clone(), namespace),
        }
    }

    /// Follows a watch as long as it goes on.
    fn add<T>(&mut self, watch: Watch<T>, events: impl Stream<Item = watcher::Result<Event<T>>> + Send + 'static)
    where
        T: Resource<DynamicType = ()> + Clone + Debug + Send + Sync + 'static,
    {
        let seen = self.seen.clone();
        seen.synced.waits(&watch.namespace, &watch.name);
        self.tasks.spawn(async move {
            let (mut events, mut list) = (std::pin::pin!(events.default_backoff().modify(without_baggage)), Vec::new());
            while let Some(event) = events.next().await {
                match event {
                    Ok(event) => seen.event(&watch, &mut list, &event),
                    Err(error) => {
                        let Watch { name, namespace, .. } = &watch;
                        tracing::warn!(namespace, "the watch of {name} was interrupted and is tried again: {error}");
                        seen.synced.failed(&watch.namespace, &watch.name, &error);
                    }
                }
            }
            watch.name
        });
    }
}

/// What nobody here reads, and is often the greater part of an object.
fn without_baggage<T: Resource>(object: &mut T) {
    object.managed_fields_mut().clear();
    object.annotations_mut().remove(LAST_APPLIED);
}

fn child<K: Resource<DynamicType = ()>>(child: &Guarded<K>) -> Change<'_> {
    Change::Child(child.meta())
}

fn whole<K>(_: &mut K) {}

/// An attempt is never written again: nothing is compared with its template, which is its greatest part.
fn without_template(attempt: &mut Job) {
    attempt.spec.iter_mut().for_each(|spec| spec.template = PodTemplateSpec::default());
}

/// Of a pod's spec, its node and the ports by which it is asked.
fn without_containers(pod: &mut Pod) {
    let Some(spec) = pod.spec.take() else { return };
    let ports = |container: Container| Container { name: container.name, ports: container.ports, ..Container::default() };
    let containers = spec.containers.into_iter().map(ports).collect();
    pod.spec = Some(PodSpec { containers, node_name: spec.node_name, ..PodSpec::default() });
}

/// A node says much that changes often and concerns nobody here.
fn allocatable(node: &mut Node) {
    let allocatable = node.status.take().and_then(|status| status.allocatable);
    node.status = Some(NodeStatus { allocatable, ..NodeStatus::default() });
    node.annotations_mut().clear();
}
