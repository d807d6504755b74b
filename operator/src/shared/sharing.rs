//! Pools that several namespaces use: which one a spec names, and whether it is there for whoever names it. Pure.
//!
//! A pool of another namespace that does not allow its user's is as one that does not exist, in words and in deeds: nobody is to learn from a
//! difference what others have. What runs on such a pool is ended; a pool that is missing in its user's own namespace ends nothing.

use std::collections::BTreeMap;
use std::fmt;

use carryon_crds::pool::{FromNamespaces, SharedNamespaces};
use carryon_crds::{BaseModelPool, CarryOnDeployment, CarryOnJob, names};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use kube::Resource;
use kube::core::{Selector, SelectorExt as _};

use super::Refusal;
use super::meta::namespace;

/// A pool as an object names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PoolPath {
    /// Namespace of the pool.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Namespace of the object.
    user: String,
    /// Its place in `spec.pools`.
    place: usize,
}

impl PoolPath {
    fn new<K: Resource>(user: &K, pool: Option<(&Option<String>, &String)>) -> Self {
        let user = namespace(user);
        let (namespace, name) = pool.map(|(namespace, name)| (namespace.clone(), name.clone())).unwrap_or_default();
        Self { namespace: namespace.unwrap_or_else(|| user.clone()), name, user, place: 0 }
    }

    fn all<'a, K: Resource>(user: &K, pools: impl Iterator<Item = (&'a Option<String>, &'a String)>) -> Vec<Self> {
        pools.enumerate().map(|(place, pool)| Self { place, ..Self::new(user, Some(pool)) }).collect()
    }

    /// The pools that a pod with these annotations works with, in the namespace of `user`.
    pub fn told(annotations: Option<&BTreeMap<String, String>>, user: &str) -> Vec<Self> {
        let told = annotations.and_then(|annotations| annotations.get(names::POOL_ANNOTATION));
        let path = |(place, pool): (usize, &str)| {
            let (namespace, name) = pool.split_once('/')?;
            Some(Self { namespace: namespace.to_owned(), name: name.to_owned(), user: user.to_owned(), place })
        };
        told.iter().flat_map(|told| told.split(',')).enumerate().filter_map(path).collect()
    }

    /// What is told of pools by an annotation.
    pub fn annotation(pools: &[Self]) -> String {
        pools.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
    }

    /// Whether the pool is of another namespace than its user.
    pub fn is_elsewhere(&self) -> bool {
        self.namespace != self.user
    }

    /// `pool`, when it is there for its user. `labels` are those of the user's namespace, where they are known.
    pub fn there(&self, pool: Option<BaseModelPool>, labels: impl FnOnce() -> Option<BTreeMap<String, String>>) -> Option<BaseModelPool> {
        pool.filter(|pool| !self.is_elsewhere() || allows(&pool.spec.sharing.namespaces, labels))
    }

    /// What is said where it is not there, whether it does not exist or is not shared.
    pub fn lacks(&self) -> Refusal {
        let advice =
            if self.is_elsewhere() { format!("create it, or share it with namespace {}", self.user) } else { "create it".to_owned() };
        Refusal::waiting("PoolNotFound", format!("BaseModelPool {self} ({}) not found: {advice}", self.field()))
    }

    /// Why what uses the pool may not go on, when that is so: the pool is of another namespace and is not there, or not any more.
    pub fn withheld(&self, found: Option<&BaseModelPool>) -> Option<Refusal> {
        (self.is_elsewhere() && found.is_none()).then(|| self.lacks())
    }

    /// Where the object names it.
    pub fn field(&self) -> String {
        format!("spec.pools[{}]", self.place)
    }

    /// Namespace of who names it.
    pub fn user(&self) -> &str {
        &self.user
    }

    /// Where its pods are reached.
    pub fn url(&self) -> String {
        names::service_url(&names::pool(&self.name), &self.namespace, names::POOL_PORT)
    }
}

impl fmt::Display for PoolPath {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}/{}", self.namespace, self.name)
    }
}

/// A kind whose specs name pools.
pub trait PoolUser {
    /// The pool that it works with, the first where there are several.
    fn pool(&self) -> PoolPath;

    /// All of them, in the order of the spec.
    fn pools(&self) -> Vec<PoolPath> {
        vec![self.pool()]
    }
}

impl PoolUser for CarryOnJob {
    fn pool(&self) -> PoolPath {
        PoolPath::new(self, self.spec.pools.first().map(|pool| (&pool.namespace, &pool.name)))
    }

    fn pools(&self) -> Vec<PoolPath> {
        PoolPath::all(self, self.spec.pools.iter().map(|pool| (&pool.namespace, &pool.name)))
    }
}

impl PoolUser for CarryOnDeployment {
    fn pool(&self) -> PoolPath {
        PoolPath::new(self, self.spec.pools.first().map(|pool| (&pool.namespace, &pool.name)))
    }

    fn pools(&self) -> Vec<PoolPath> {
        PoolPath::all(self, self.spec.pools.iter().map(|pool| (&pool.namespace, &pool.name)))
    }
}

/// Labels of the namespaces, beside the pool's own, that it is shared with; the empty selector is of all.
pub fn selector(shared: &SharedNamespaces) -> Option<LabelSelector> {
    match shared.from {
        FromNamespaces::Same => None,
        FromNamespaces::All => Some(LabelSelector::default()),
        FromNamespaces::Selector => shared.selector.clone(),
    }
}

/// Whether a namespace with these labels is among the shared ones. One of which none are known is among all, and not selected.
fn allows(shared: &SharedNamespaces, labels: impl FnOnce() -> Option<BTreeMap<String, String>>) -> bool {
    let selector = || selector(shared).and_then(|selector| Selector::try_from(selector).ok());
    shared.from == FromNamespaces::All || selector().is_some_and(|selector| labels().is_some_and(|labels| selector.matches(&labels)))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn pool(namespaces: &Value) -> BaseModelPool {
        let spec = json!({ "model": { "source": {} }, "sharing": { "namespaces": namespaces } });
        serde_json::from_value(json!({ "metadata": { "namespace": "platform", "name": "base" }, "spec": spec })).unwrap()
    }

    fn path(pool: &Value) -> PoolPath {
        let spec = json!({ "pools": [pool], "heads": [] });
        serde_json::from_value::<CarryOnDeployment>(json!({ "metadata": { "namespace": "team-a", "name": "x" }, "spec": spec }))
            .unwrap()
            .pool()
    }

    #[test]
    fn another_namespace_sees_what_is_shared_with_it() {
        let team = json!({ "from": "Selector", "selector": { "matchLabels": { "team": "a" } } });
        let others =
            json!({ "from": "Selector", "selector": { "matchExpressions": [{ "key": "team", "operator": "NotIn", "values": ["a"] }] } });
        let cases = [
            (json!({}), [false, false, false]),
            (json!({ "from": "Same" }), [false, false, false]),
            (json!({ "from": "All" }), [true, true, true]),
            (team, [true, false, false]),
            (others, [false, true, false]),
            (json!({ "from": "Selector", "selector": {} }), [true, true, false]),
            // Such as no API server takes.
            (json!({ "from": "Selector" }), [false, false, false]),
            (
                json!({ "from": "Selector", "selector": { "matchExpressions": [{ "key": "team", "operator": "Like" }] } }),
                [false, false, false],
            ),
        ];
        for (namespaces, expected) in cases {
            let labels = |labels: &Value| serde_json::from_value::<Option<BTreeMap<String, String>>>(labels.clone()).unwrap();
            let seen = [json!({ "team": "a" }), json!({}), json!(null)].map(|known| {
                let elsewhere = path(&json!({ "name": "base", "namespace": "platform" }));
                elsewhere.there(Some(pool(&namespaces)), || labels(&known)).is_some()
            });
            assert_eq!(seen, expected, "{namespaces}: of the team, of nobody, unknown");
            let own = PoolPath { user: "platform".to_owned(), ..path(&json!({ "name": "base", "namespace": "platform" })) };
            assert!(own.there(Some(pool(&namespaces)), || None).is_some(), "{namespaces}: its own namespace");
        }
    }

    #[test]
    fn only_a_pool_of_another_namespace_is_withheld() {
        let (own, other) = (path(&json!({ "name": "base" })), path(&json!({ "name": "base", "namespace": "platform" })));
        assert_eq!((own.url().as_str(), other.url().as_str()), ("http://base-pool.team-a.svc:8080", "http://base-pool.platform.svc:8080"));
        assert_eq!(own.lacks().message, "BaseModelPool team-a/base (spec.pools[0]) not found: create it");
        let says = "BaseModelPool platform/base (spec.pools[0]) not found: create it, or share it with namespace team-a";
        assert_eq!(other.withheld(None).map(|refusal| refusal.message).as_deref(), Some(says));
        assert_eq!((own.withheld(None), other.withheld(Some(&pool(&json!({}))))), (None, None));
        assert!(!path(&json!({ "name": "base", "namespace": "team-a" })).is_elsewhere(), "its own, in so many words");
    }
}
