//! What the cluster holds, as watches show it: one cache per type, and who has to look again when an object changes.

use std::fmt::Debug;
use std::future::Future;
use std::sync::Arc;

use carryon_crds::{BaseModelPool, CarryOnDeployment, CarryOnJob, names};
use futures::StreamExt as _;
use k8s_openapi::api::apps::v1::{Deployment, StatefulSet};
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{
    ConfigMap, Container, Node, NodeStatus, PersistentVolumeClaim, Pod, PodSpec, PodTemplateSpec, Secret, Service,
};
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use kube::api::PartialObjectMeta;
use kube::core::{DeserializeGuard, NamespaceResourceScope};
use kube::runtime::WatchStreamExt as _;
use kube::runtime::reflector::{ObjectRef, Store, store};
use kube::runtime::watcher::{self, watcher};
use kube::{Api, Client, Resource, ResourceExt as _};
use serde::de::DeserializeOwned;
use tokio::task::JoinSet;

use super::wake::Wake;
use super::written::Written;
use crate::shared::meta::{Owner, namespace};

/// Where `kubectl apply` keeps a copy of the whole object.
const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";

/// An object, or what is known of one that cannot be decoded: it must not stop the watch of its kind.
pub type Guarded<K> = DeserializeGuard<K>;

/// Objects of one type, by namespace and name.
pub struct Cache<K: Resource<DynamicType = ()> + 'static>(Store<Guarded<K>>);

impl<K: Resource<DynamicType = ()> + Clone + 'static> Cache<K> {
    /// The object, when it exists and can be decoded.
    pub fn get(&self, namespace: &str, name: &str) -> Option<K> {
        self.0.get(&ObjectRef::new(name).within(namespace))?.0.as_ref().ok().cloned()
    }

    /// All objects that can be decoded and for which `wanted` holds, by name.
    pub fn list(&self, wanted: impl Fn(&K) -> bool) -> Vec<K> {
        let all = self.0.state();
        let mut found: Vec<K> = all.iter().filter_map(|object| object.0.as_ref().ok().filter(|object| wanted(object)).cloned()).collect();
        found.sort_by_key(|object| (object.namespace(), object.name_any()));
        found
    }

    /// The cache itself.
    pub fn store(&self) -> Store<Guarded<K>> {
        self.0.clone()
    }
}

/// Which objects of one type exist, without their content.
pub struct Names<K: Resource<DynamicType = ()> + 'static>(Store<PartialObjectMeta<K>>);

impl<K: Resource<DynamicType = ()> + Clone + 'static> Names<K> {
    /// Metadata of the object.
    pub fn get(&self, namespace: &str, name: &str) -> Option<Arc<PartialObjectMeta<K>>> {
        self.0.get(&ObjectRef::new(name).within(namespace))
    }
}

impl Names<PersistentVolumeClaim> {
    /// The claim, of which no more is known than that it exists.
    pub fn claim(&self, namespace: &str, name: &str) -> Option<PersistentVolumeClaim> {
        let metadata = self.get(namespace, name)?.metadata.clone();
        Some(PersistentVolumeClaim { metadata, ..PersistentVolumeClaim::default() })
    }
}

/// All that is watched.
pub struct Caches {
    /// The three kinds.
    pub pools: Cache<BaseModelPool>,
    /// Training jobs.
    pub jobs: Cache<CarryOnJob>,
    /// Served heads.
    pub deployments: Cache<CarryOnDeployment>,
    /// Children: the workloads …
    pub stateful_sets: Cache<StatefulSet>,
    /// … of gateways …
    pub workloads: Cache<Deployment>,
    /// … of training attempts.
    pub attempts: Cache<Job>,
    /// Their pods.
    pub pods: Cache<Pod>,
    /// Children: Services.
    pub services: Cache<Service>,
    /// Children: the workers' configuration.
    pub config_maps: Cache<ConfigMap>,
    /// Children: disruption budgets of pools.
    pub budgets: Cache<PodDisruptionBudget>,
    /// Claims of users.
    pub claims: Names<PersistentVolumeClaim>,
    /// ConfigMaps of users.
    pub data: Names<ConfigMap>,
    /// Secrets of users.
    pub secrets: Names<Secret>,
    /// Nodes, with their labels and what they have to give; none when one namespace is looked after, which has no right to see them.
    pub nodes: Option<Cache<Node>>,
}

impl Caches {
    /// The pods of `owner`, by name.
    pub fn pods_of(&self, owner: &Owner) -> Vec<Pod> {
        let selector = owner.selector();
        let selected = |pod: &Pod| selector.iter().all(|(key, value)| pod.labels().get(key) == Some(value));
        self.pods.list(|pod| namespace(pod) == owner.namespace && selected(pod))
    }
}

/// Starts all watches and waits until each has seen the cluster once.
///
/// # Errors
/// When a watch ends before that.
pub async fn start(
    client: &Client,
    namespace: Option<&str>,
    wake: Wake,
    written: Arc<Written>,
) -> anyhow::Result<(Arc<Caches>, JoinSet<&'static str>)> {
    let ours = watcher::Config::default().labels(&format!("app.kubernetes.io/managed-by={}", names::MANAGER));
    let others = watcher::Config::default().labels(&format!("app.kubernetes.io/managed-by!={}", names::MANAGER));
    let any = watcher::Config::default();
    let mut watches = Watches { client, namespace, written, tasks: Vec::new() };
    let caches = Arc::new(Caches {
        pools: watches.kind(&any, whole, Wake::pool),
        jobs: watches.kind(&any, whole, Wake::job),
        deployments: watches.kind(&any, whole, Wake::deployment),
        stateful_sets: watches.kind(&ours, whole, Wake::owner),
        workloads: watches.kind(&ours, whole, Wake::owner),
        attempts: watches.kind(&ours, without_template, Wake::instance),
        pods: watches.kind(&ours, without_containers, Wake::instance),
        services: watches.kind(&ours, whole, Wake::owner),
        config_maps: watches.kind(&ours, whole, Wake::owner),
        budgets: watches.kind(&ours, whole, Wake::owner),
        claims: watches.names(any.clone(), |wake, caches, claim| wake.users_of_claim(caches, claim)),
        data: watches.names(others, |wake, caches, data| wake.users_of_data(caches, data)),
        secrets: watches.names(any.clone(), |wake, caches, secret| wake.users_of_secret(caches, secret)),
        nodes: namespace.is_none().then(|| watches.nodes()),
    });
    let mut running = JoinSet::new();
    let mut ready = Vec::new();
    for Watch { name, run, seen } in watches.tasks {
        running.spawn(run(caches.clone(), wake.clone()));
        ready.push(async move { seen.await.map_err(|_| anyhow::anyhow!("the watch of {name} has ended")) });
    }
    futures::future::try_join_all(ready).await?;
    Ok((caches, running))
}

type Run = Box<dyn FnOnce(Arc<Caches>, Wake) -> std::pin::Pin<Box<dyn Future<Output = &'static str> + Send>> + Send>;

/// A watch that is to be run.
struct Watch {
    name: &'static str,
    run: Run,
    /// Sent to when the whole of the cluster has been seen once.
    seen: tokio::sync::oneshot::Receiver<()>,
}

struct Watches<'a> {
    client: &'a Client,
    namespace: Option<&'a str>,
    written: Arc<Written>,
    tasks: Vec<Watch>,
}

impl Watches<'_> {
    fn api<K: Resource<DynamicType = (), Scope = NamespaceResourceScope>>(&self) -> Api<K> {
        match self.namespace {
            Some(namespace) => Api::namespaced(self.client.clone(), namespace),
            None => Api::all(self.client.clone()),
        }
    }

    /// A type of which only what `trim` leaves is kept.
    fn kind<K>(
        &mut self,
        config: &watcher::Config,
        trim: impl Fn(&mut K) + Send + 'static,
        wakes: impl Fn(&Wake, &Caches, &Guarded<K>) + Send + 'static,
    ) -> Cache<K>
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + DeserializeOwned + Debug + Send + Sync + 'static,
    {
        let api: Api<Guarded<K>> = self.api();
        let events = watcher(api, config.clone()).modify(move |object| object.0.iter_mut().for_each(&trim));
        Cache(self.add(short_name::<K>(), events, wakes))
    }

    fn names<K>(&mut self, config: watcher::Config, wakes: impl Fn(&Wake, &Caches, &PartialObjectMeta<K>) + Send + 'static) -> Names<K>
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + DeserializeOwned + Debug + Send + Sync + 'static,
    {
        let api: Api<PartialObjectMeta<K>> = self.api();
        Names(self.add(short_name::<K>(), watcher(api, config), wakes))
    }

    fn nodes(&mut self) -> Cache<Node> {
        let api: Api<Guarded<Node>> = Api::all(self.client.clone());
        let nodes = watcher(api, watcher::Config::default()).modify(|node| node.0.iter_mut().for_each(allocatable));
        Cache(self.add(short_name::<Node>(), nodes, |wake, caches, _| wake.unready_pools(caches)))
    }

    fn add<K>(
        &mut self,
        name: &'static str,
        events: impl futures::Stream<Item = watcher::Result<watcher::Event<K>>> + Send + 'static,
        wakes: impl Fn(&Wake, &Caches, &K) + Send + 'static,
    ) -> Store<K>
    where
        K: Resource<DynamicType = ()> + Clone + Debug + Send + Sync + 'static,
    {
        let (reader, mut writer) = store::<K>();
        let (saw, seen) = tokio::sync::oneshot::channel();
        let written = self.written.clone();
        let run: Run = Box::new(move |caches, wake| {
            Box::pin(async move {
                let mut saw = Some(saw);
                let events = events.default_backoff().modify(|object| {
                    object.managed_fields_mut().clear();
                    object.annotations_mut().remove(LAST_APPLIED);
                });
                let mut events = std::pin::pin!(events);
                while let Some(event) = events.next().await {
                    let event = match event {
                        Ok(event) => event,
                        Err(error) => {
                            tracing::warn!(%error, "the watch of {name} was interrupted; it is tried again");
                            continue;
                        }
                    };
                    writer.apply_watcher_event(&event);
                    match &event {
                        watcher::Event::Apply(object) => wakes(&wake, &caches, object),
                        watcher::Event::Delete(object) => {
                            written.gone(object);
                            wakes(&wake, &caches, object);
                        }
                        // What was deleted while nobody watched has no event of its own.
                        watcher::Event::InitDone => {
                            written.relisted::<K>();
                            saw.take().map(|saw| saw.send(()));
                            wake.all(&caches);
                        }
                        watcher::Event::Init | watcher::Event::InitApply(_) => {}
                    }
                }
                name
            })
        });
        self.tasks.push(Watch { name, run, seen });
        reader
    }
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

fn short_name<K>() -> &'static str {
    std::any::type_name::<K>().rsplit("::").next().unwrap_or_default()
}
