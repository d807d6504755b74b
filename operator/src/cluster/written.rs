//! What was written a moment ago, for as long as the caches have not seen it.

use std::any::Any;
use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use kube::{Resource, ResourceExt as _};

/// How long what was written stands in for a cache that has not seen it yet.
const FRESH: Duration = Duration::from_secs(15);

/// Children by type, namespace and name. Without it, a look at an object between a write and its event would write again.
#[derive(Default)]
pub struct Written(Mutex<BTreeMap<String, Entry>>);

struct Entry {
    digest: String,
    uid: Option<String>,
    object: Box<dyn Any + Send>,
    at: Instant,
}

impl Written {
    /// `object` was the answer to a write of what has this digest.
    pub fn insert<K: Resource<DynamicType = ()> + Send + 'static>(&self, object: K, digest: String) {
        let (key, uid) = (key(&object), object.uid());
        self.lock().insert(key, Entry { digest, uid, object: Box::new(object), at: Instant::now() });
    }

    /// The answer to the last write of `wanted`, when that had this digest and the caches may not have seen it yet.
    pub fn get<K: Resource<DynamicType = ()> + Clone + 'static>(&self, wanted: &K, digest: &str) -> Option<K> {
        let mut entries = self.lock();
        entries.retain(|_, entry| entry.at.elapsed() < FRESH);
        let found = entries.get(&key(wanted)).filter(|entry| entry.digest == digest)?;
        found.object.downcast_ref().cloned()
    }

    /// The cache has seen it.
    pub fn seen<K: Resource<DynamicType = ()>>(&self, object: &K) {
        self.lock().remove(&key(object));
    }

    /// The cache has seen it go. One of the same name that was made since is another.
    pub fn gone<K: Resource<DynamicType = ()>>(&self, object: &K) {
        let (key, uid) = (key(object), object.uid());
        self.lock().retain(|known, entry| *known != key || entry.uid != uid);
    }

    /// The cache has seen all objects of this type anew.
    pub fn relisted<K: Resource<DynamicType = ()>>(&self) {
        let prefix = format!("{}/", K::kind(&()));
        self.lock().retain(|known, _| !known.starts_with(&prefix));
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Entry>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn key<K: Resource<DynamicType = ()>>(object: &K) -> String {
    format!("{}/{}/{}", K::kind(&()), object.namespace().unwrap_or_default(), object.name_any())
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::ConfigMap;
    use serde_json::json;

    use super::Written;

    #[test]
    fn what_is_gone_is_not_remembered_and_what_was_made_since_is() {
        let of = |uid: &str| -> ConfigMap {
            serde_json::from_value(json!({ "metadata": { "name": "a", "namespace": "b", "uid": uid } })).unwrap()
        };
        let written = Written::default();
        let write = |uid: &str| written.insert(of(uid), "digest".to_owned());
        write("1");
        assert!(written.get(&of(""), "digest").is_some());
        assert!(written.get(&of(""), "another").is_none());
        written.gone(&of("1"));
        assert!(written.get(&of(""), "digest").is_none());
        write("2");
        written.gone(&of("1"));
        assert_eq!(written.get(&of(""), "digest").unwrap().metadata.uid.as_deref(), Some("2"));
        written.relisted::<ConfigMap>();
        assert!(written.get(&of(""), "digest").is_none());
    }
}
