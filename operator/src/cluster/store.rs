//! What the cluster holds, as watches have shown it: one cache per type.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use carryon_crds::{BaseModelPool, CarryOnDeployment, CarryOnJob, names};
use k8s_openapi::api::apps::v1::{ControllerRevision, Deployment, StatefulSet};
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Node, PersistentVolumeClaim, Pod, Service};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use kube::api::PartialObjectMeta;
use kube::core::DeserializeGuard;
use kube::runtime::reflector::store::Writer;
use kube::runtime::reflector::{ObjectRef, Store};
use kube::runtime::watcher::Event;
use kube::{Resource, ResourceExt as _};

use super::lock::lock;
use crate::shared::meta::Owner;
use crate::shared::sharing::{PoolPath, PoolUser};

/// Component label of a pool.
const POOL: &str = "pool";

/// An object, or what is known of one that cannot be decoded: it must not stop the watch of its kind.
pub type Guarded<K> = DeserializeGuard<K>;

/// Which objects of a type exist, without their content.
pub type Names<K> = Cache<PartialObjectMeta<K>>;

/// All that is watched.
pub struct Stores {
    /// The three kinds.
    pub pools: Cache<Guarded<BaseModelPool>>,
    /// Training jobs.
    pub jobs: Cache<Guarded<CarryOnJob>>,
    /// Served heads.
    pub deployments: Cache<Guarded<CarryOnDeployment>>,
    /// Children: the workloads …
    pub stateful_sets: Cache<Guarded<StatefulSet>>,
    /// … of gateways …
    pub workloads: Cache<Guarded<Deployment>>,
    /// … of training attempts.
    pub attempts: Cache<Guarded<Job>>,
    /// Their pods.
    pub pods: Cache<Guarded<Pod>>,
    /// Children: Services.
    pub services: Cache<Guarded<Service>>,
    /// Children: the workers' configuration.
    pub config_maps: Cache<Guarded<ConfigMap>>,
    /// What pods were rendered as.
    pub revisions: Cache<Guarded<ControllerRevision>>,
    /// Children: disruption budgets.
    pub budgets: Cache<Guarded<PodDisruptionBudget>>,
    /// Children: who may reach pods.
    pub policies: Cache<Guarded<NetworkPolicy>>,
    /// Claims of users.
    pub claims: Names<PersistentVolumeClaim>,
    /// Nodes, with their labels and what they have to give; none for who looks after some namespaces, and has no right to see them.
    pub nodes: Option<Cache<Guarded<Node>>>,
    /// Namespaces, with their labels; none as for nodes.
    pub namespaces: Option<Names<Namespace>>,
}

impl Default for Stores {
    fn default() -> Self {
        Self {
            pools: Cache::default(),
            jobs: Cache::by(uses),
            deployments: Cache::by(uses),
            stateful_sets: Cache::default(),
            workloads: Cache::default(),
            attempts: Cache::default(),
            pods: Cache::default(),
            services: Cache::default(),
            config_maps: Cache::default(),
            revisions: Cache::default(),
            budgets: Cache::default(),
            policies: Cache::default(),
            claims: Cache::default(),
            nodes: None,
            namespaces: None,
        }
    }
}

impl Stores {
    /// The pool, when it is there for its user.
    pub fn pool(&self, path: &PoolPath) -> Option<BaseModelPool> {
        path.there(self.pools.get(&path.namespace, &path.name), || self.namespaces.as_ref()?.labels(path.user()))
    }

    /// What the pods of `owner`, whose child is called `child`, were rendered as.
    pub fn revisions_of(&self, owner: &Owner, child: &str) -> Vec<ControllerRevision> {
        let of_child = self.revisions.owned_by(&owner.namespace, names::REVISION, child);
        of_child.into_iter().filter(|revision| owner.controls(revision)).collect()
    }

    /// The ConfigMaps that the pods of `owner` read, or have read.
    pub fn config_maps_of(&self, owner: &Owner) -> Vec<ConfigMap> {
        children(&self.config_maps, owner)
    }

    /// The NetworkPolicies of `owner`.
    pub fn policies_of(&self, owner: &Owner) -> Vec<NetworkPolicy> {
        children(&self.policies, owner)
    }
}

/// Those with the labels of `owner` that no other object controls.
fn children<K: Resource<DynamicType = ()> + Clone + 'static>(cache: &Cache<Guarded<K>>, owner: &Owner) -> Vec<K> {
    cache.owned_by(&owner.namespace, owner.component, &owner.name).into_iter().filter(|child| owner.controls(child)).collect()
}

/// Objects of one type, by namespace and name, and by what they belong to.
pub struct Cache<T: Resource<DynamicType = ()> + Clone + 'static> {
    writer: Mutex<Writer<T>>,
    objects: Store<T>,
    belongs: fn(&T) -> Vec<Belongs>,
    index: RwLock<Index>,
}

/// Namespace, component and instance that an object belongs to: a child to its owner, by its labels; a job or a deployment to its pools.
type Belongs = [String; 3];
/// Namespaces and names of objects by what they belong to.
type Index = HashMap<Belongs, BTreeSet<[String; 2]>>;

impl<T: Resource<DynamicType = ()> + Clone + 'static> Default for Cache<T> {
    fn default() -> Self {
        Self::by(owner)
    }
}

impl<T: Resource<DynamicType = ()> + Clone + 'static> Cache<T> {
    fn by(belongs: fn(&T) -> Vec<Belongs>) -> Self {
        let writer = Writer::<T>::default();
        Self { objects: writer.as_reader(), writer: Mutex::new(writer), belongs, index: RwLock::default() }
    }

    /// What the watch has shown.
    pub fn apply(&self, event: &Event<T>) {
        lock(&self.writer).apply_watcher_event(event);
        let mut index = self.index.write().unwrap_or_else(PoisonError::into_inner);
        match event {
            Event::Apply(object) => self.enter(&mut index, object),
            Event::Delete(object) => self.strike(&mut index, object),
            Event::InitDone => {
                index.clear();
                self.objects.state().iter().for_each(|object| self.enter(&mut index, object));
            }
            Event::Init | Event::InitApply(_) => {}
        }
    }

    /// What the list of one namespace has shown; the others stay as they are.
    pub fn listed(&self, namespace: &str, list: Vec<T>) {
        let names: BTreeSet<String> = list.iter().map(kube::ResourceExt::name_any).collect();
        let is_gone = |object: &T| object.namespace().as_deref() == Some(namespace) && !names.contains(&object.name_any());
        self.objects.state_filter(is_gone).iter().for_each(|object| self.apply(&Event::Delete((**object).clone())));
        list.into_iter().for_each(|object| self.apply(&Event::Apply(object)));
    }

    fn enter(&self, index: &mut Index, object: &T) {
        for key in (self.belongs)(object) {
            index.entry(key).or_default().insert(place(object));
        }
    }

    fn strike(&self, index: &mut Index, object: &T) {
        for key in (self.belongs)(object) {
            let Some(places) = index.get_mut(&key) else { continue };
            places.remove(&place(object));
            if places.is_empty() {
                index.remove(&key);
            }
        }
    }

    /// The objects that belong there, by namespace and name. One that has changed since it was entered may not any more.
    fn belonging(&self, key: &Belongs) -> Vec<Arc<T>> {
        let index = self.index.read().unwrap_or_else(PoisonError::into_inner);
        let entered = index.get(key).into_iter().flatten().filter_map(|[namespace, name]| self.shown(namespace, name));
        entered.filter(|object| (self.belongs)(object).contains(key)).collect()
    }

    /// The object as it was shown, decoded or not.
    pub fn shown(&self, namespace: &str, name: &str) -> Option<Arc<T>> {
        self.objects.get(&ObjectRef::new(name).within(namespace))
    }

    /// All objects.
    pub fn all(&self) -> Vec<Arc<T>> {
        self.objects.state()
    }
}

impl<K: Resource<DynamicType = ()> + Clone + 'static> Cache<Guarded<K>> {
    /// The object, when it exists and can be decoded.
    pub fn get(&self, namespace: &str, name: &str) -> Option<K> {
        self.shown(namespace, name)?.0.as_ref().ok().cloned()
    }

    /// All objects that can be decoded and for which `wanted` holds, by name.
    pub fn list(&self, wanted: impl Fn(&K) -> bool) -> Vec<K> {
        let holds = |object: &Guarded<K>| object.0.as_ref().is_ok_and(&wanted);
        let mut found: Vec<K> = self.objects.state_filter(holds).iter().filter_map(|object| object.0.as_ref().ok().cloned()).collect();
        found.sort_by_key(|object| (object.namespace(), object.name_any()));
        found
    }

    /// The names of those in a namespace.
    pub fn names_of(&self, namespace: &str, wanted: impl Fn(&K) -> bool) -> Vec<String> {
        let holds = |object: &Guarded<K>| object.meta().namespace.as_deref() == Some(namespace) && object.0.as_ref().is_ok_and(&wanted);
        self.objects.state_filter(holds).iter().map(|object| object.name_any()).collect()
    }

    /// Those that have the labels of this component and instance, by name.
    pub fn owned_by(&self, namespace: &str, component: &str, instance: &str) -> Vec<K> {
        let owned = self.belonging(&[namespace, component, instance].map(str::to_owned));
        owned.iter().filter_map(|object| object.0.as_ref().ok().cloned()).collect()
    }
}

impl<K: Resource<DynamicType = ()> + PoolUser + Clone + 'static> Cache<Guarded<K>> {
    /// Those that name this pool, whatever their namespaces.
    pub fn users_of(&self, namespace: &str, pool: &str) -> Vec<Arc<Guarded<K>>> {
        self.belonging(&[namespace, POOL, pool].map(str::to_owned))
    }
}

impl Names<Namespace> {
    /// Labels of a namespace that exists.
    fn labels(&self, name: &str) -> Option<BTreeMap<String, String>> {
        self.objects.get(&ObjectRef::new(name)).map(|namespace| namespace.labels().clone())
    }
}

impl Names<PersistentVolumeClaim> {
    /// The claim, of which no more is known than that it exists.
    pub fn claim(&self, namespace: &str, name: &str) -> Option<PersistentVolumeClaim> {
        let metadata = self.shown(namespace, name)?.metadata.clone();
        Some(PersistentVolumeClaim { metadata, ..PersistentVolumeClaim::default() })
    }
}

/// Whose child it is.
fn owner<T: Resource>(object: &T) -> Vec<Belongs> {
    let label = |key: &str| object.labels().get(key).cloned();
    let owner = || Some([object.namespace()?, label(names::COMPONENT_LABEL)?, label(names::INSTANCE_LABEL)?]);
    owner().into_iter().collect()
}

/// Which pools it uses.
fn uses<K: PoolUser>(object: &Guarded<K>) -> Vec<Belongs> {
    let pools = object.0.as_ref().map(PoolUser::pools).unwrap_or_default();
    pools.into_iter().map(|PoolPath { namespace, name, .. }| [namespace, POOL.to_owned(), name]).collect()
}

fn place<T: Resource>(object: &T) -> [String; 2] {
    [object.namespace().unwrap_or_default(), object.name_any()]
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::Pod;
    use kube::ResourceExt as _;
    use kube::runtime::watcher::Event;
    use serde_json::json;

    use super::{Cache, Guarded, Stores};

    fn pod(name: &str, instance: &str) -> Guarded<Pod> {
        pod_in("team", name, instance)
    }

    fn pod_in(namespace: &str, name: &str, instance: &str) -> Guarded<Pod> {
        let labels = json!({ "app.kubernetes.io/component": "pool", "app.kubernetes.io/instance": instance });
        serde_json::from_value(json!({ "metadata": { "name": name, "namespace": namespace, "labels": labels } })).unwrap()
    }

    #[test]
    fn a_pool_s_users_are_found_in_all_namespaces_until_they_name_another() {
        let stores = Stores::default();
        let names = |namespace: &str, pool: &str| {
            let spec = json!({ "pools": [{ "name": pool, "namespace": "platform" }], "heads": [] });
            let metadata = json!({ "name": "chat", "namespace": namespace });
            stores.deployments.apply(&Event::Apply(serde_json::from_value(json!({ "metadata": metadata, "spec": spec })).unwrap()));
        };
        let users = |namespace: &str, pool: &str| {
            let users = stores.deployments.users_of(namespace, pool);
            users.iter().map(|user| user.namespace().unwrap()).collect::<Vec<_>>()
        };
        names("team-b", "base");
        names("team-a", "base");
        assert_eq!((users("platform", "base"), users("team-a", "base")), (vec!["team-a".to_owned(), "team-b".to_owned()], vec![]));
        names("team-b", "other");
        assert_eq!((users("platform", "base"), users("platform", "other")), (vec!["team-a".to_owned()], vec!["team-b".to_owned()]));
    }

    #[test]
    fn pods_are_found_by_their_owner_through_changes_and_a_new_list() {
        let cache = Cache::<Guarded<Pod>>::default();
        let names = |instance: &str| cache.owned_by("team", "pool", instance).iter().map(|pod| pod.name_any()).collect::<Vec<_>>();
        ["b", "a", "other"].iter().for_each(|name| cache.apply(&Event::Apply(pod(name, if *name == "other" { "y" } else { "x" }))));
        assert_eq!((names("x"), names("y")), (vec!["a".to_owned(), "b".to_owned()], vec!["other".to_owned()]));
        cache.apply(&Event::Delete(pod("a", "x")));
        // Its labels have changed.
        cache.apply(&Event::Apply(pod("b", "y")));
        assert_eq!((names("x").len(), names("y").len()), (0, 2));
        cache.apply(&Event::Init);
        cache.apply(&Event::InitApply(pod("c", "x")));
        assert_eq!(names("x").len(), 0, "not before the list is whole");
        cache.apply(&Event::InitDone);
        assert_eq!((names("x"), names("y").len()), (vec!["c".to_owned()], 0));
    }

    #[test]
    fn a_list_of_one_namespace_takes_nothing_away_from_the_others() {
        let cache = Cache::<Guarded<Pod>>::default();
        let list =
            |namespace: &str, names: &[&str]| cache.listed(namespace, names.iter().map(|name| pod_in(namespace, name, "x")).collect());
        let names = |namespace: &str| {
            let owned: Vec<String> = cache.owned_by(namespace, "pool", "x").iter().map(|pod| pod.name_any()).collect();
            let mut all = cache.names_of(namespace, |_| true);
            all.sort();
            assert_eq!(owned, all);
            owned.join(" ")
        };
        list("a", &["one", "two"]);
        list("b", &["one"]);
        assert_eq!((names("a").as_str(), names("b").as_str()), ("one two", "one"));
        cache.apply(&Event::Apply(pod_in("b", "three", "x")));
        list("a", &["two", "three"]);
        assert_eq!((names("a").as_str(), names("b").as_str()), ("three two", "one three"));
        list("b", &[]);
        assert_eq!((names("a").as_str(), names("b").as_str()), ("three two", ""));
    }
}
