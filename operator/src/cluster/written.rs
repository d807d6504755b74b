//! The operator's own writes of late, for as long as the caches may not have seen them: without them, a reconcile between a write and its
//! event would act on the past.

use std::any::Any;
use std::collections::HashMap;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use kube::{Resource, ResourceExt};

use super::lock::lock;

/// How long a write is remembered; the caches see it long before.
const FRESH: Duration = Duration::from_secs(60);

/// Writes by type, namespace and name.
#[derive(Default)]
pub struct Written(Mutex<Writes>);

#[derive(Default)]
struct Writes {
    by_object: HashMap<String, Write>,
    /// When the old ones were forgotten.
    swept: Option<Instant>,
}

struct Write {
    at: Instant,
    /// Version of the object that was written over, and that a cache may still hold; none when there was no object.
    replaced: Option<String>,
    uid: Option<String>,
    version: Option<String>,
    /// Digest of what was wanted, and the object as the API server holds it since.
    answer: Option<(String, Box<dyn Any + Send>)>,
}

impl Written {
    /// A child was written: `answer` has come of what has this digest, in place of what had this version.
    pub fn child<K: Resource<DynamicType = ()> + Clone + Send + 'static>(&self, answer: &K, digest: String, replaced: Option<String>) {
        self.insert(answer, replaced, Some((digest, Box::new(answer.clone()))));
    }

    /// A status was written in place of what had this version.
    pub fn status<K: Resource<DynamicType = ()>>(&self, answer: &K, replaced: Option<String>) {
        self.insert(answer, replaced, None);
    }

    /// The answer to the last write of `wanted`, when that had this digest and the cache still holds what was there before.
    pub fn answer<K: Resource<DynamicType = ()> + Clone + 'static>(&self, wanted: &K, digest: &str, cached: Option<&K>) -> Option<K> {
        let writes = lock(&self.0);
        let write = writes.by_object.get(&key(wanted)).filter(|write| write.at.elapsed() < FRESH)?;
        let (written, answer) = write.answer.as_ref()?;
        let is_behind = write.replaced == cached.and_then(ResourceExt::resource_version);
        if is_behind && written == digest { answer.downcast_ref().cloned() } else { None }
    }

    /// Whether the cache is yet to see the last write of an object that it holds.
    pub fn is_ahead_of<K: Resource<DynamicType = ()>>(&self, cached: &K) -> bool {
        let writes = lock(&self.0);
        let write = writes.by_object.get(&key(cached)).filter(|write| write.at.elapsed() < FRESH);
        write
            .is_some_and(|write| write.replaced.is_some() && write.replaced == cached.resource_version() && write.version != write.replaced)
    }

    /// A cache has seen this version of an object.
    pub fn seen<K: Resource<DynamicType = ()>>(&self, object: &K) {
        if let Some(write) = lock(&self.0).by_object.get_mut(&key(object)).filter(|write| write.version == object.resource_version()) {
            write.answer = None;
        }
    }

    /// A cache has seen it go. One of the same name that was made since is another.
    pub fn gone<K: Resource<DynamicType = ()>>(&self, object: &K) {
        let (key, uid) = (key(object), object.uid());
        let mut writes = lock(&self.0);
        if writes.by_object.get(&key).is_some_and(|write| write.uid == uid) {
            writes.by_object.remove(&key);
        }
    }

    /// A cache has seen all objects of this type anew, those of a namespace or, without a name, all.
    pub fn listed<K: Resource<DynamicType = ()>>(&self, namespace: &str) {
        let prefix = format!("{}/{namespace}{}", K::kind(&()), if namespace.is_empty() { "" } else { "/" });
        lock(&self.0).by_object.retain(|known, _| !known.starts_with(&prefix));
    }

    fn insert<K: Resource<DynamicType = ()>>(&self, written: &K, replaced: Option<String>, answer: Option<(String, Box<dyn Any + Send>)>) {
        let mut writes = lock(&self.0);
        if writes.swept.is_none_or(|swept| swept.elapsed() >= FRESH) {
            writes.swept = Some(Instant::now());
            writes.by_object.retain(|_, write| write.at.elapsed() < FRESH);
        }
        let (uid, version) = (written.uid(), written.resource_version());
        writes.by_object.insert(key(written), Write { at: Instant::now(), replaced, uid, version, answer });
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

    fn of(uid: &str, version: &str) -> ConfigMap {
        let metadata = json!({ "name": "a", "namespace": "b", "uid": uid, "resourceVersion": version });
        serde_json::from_value(json!({ "metadata": metadata })).unwrap()
    }

    #[test]
    fn a_write_stands_in_for_the_cache_until_that_has_seen_it() {
        let (written, wanted) = (Written::default(), of("", ""));
        written.child(&of("1", "7"), "digest".to_owned(), None);
        let version = |cached: Option<&ConfigMap>, digest: &str| written.answer(&wanted, digest, cached)?.metadata.resource_version;
        assert_eq!(version(None, "digest").as_deref(), Some("7"));
        assert_eq!(version(None, "another"), None);
        assert_eq!(version(Some(&of("1", "8")), "digest"), None, "somebody has written since");
        written.child(&of("1", "9"), "digest".to_owned(), Some("8".to_owned()));
        assert_eq!(version(Some(&of("1", "8")), "digest").as_deref(), Some("9"));
        assert_eq!(version(None, "digest"), None);
        written.seen(&of("1", "9"));
        assert_eq!(version(Some(&of("1", "8")), "digest"), None);
    }

    #[test]
    fn what_is_gone_is_not_remembered_and_what_was_made_since_is() {
        let (written, wanted) = (Written::default(), of("", ""));
        let write = |uid: &str| written.child(&of(uid, "1"), "digest".to_owned(), None);
        let uid = || written.answer(&wanted, "digest", None)?.metadata.uid;
        write("1");
        written.gone(&of("1", "2"));
        assert_eq!(uid(), None);
        write("2");
        written.gone(&of("1", "2"));
        assert_eq!(uid().as_deref(), Some("2"));
        written.listed::<ConfigMap>("another");
        assert_eq!(uid().as_deref(), Some("2"));
        written.listed::<ConfigMap>("b");
        assert_eq!(uid(), None);
        write("3");
        written.listed::<ConfigMap>("");
        assert_eq!(uid(), None);
    }

    #[test]
    fn an_object_whose_status_was_written_is_known_to_be_old() {
        let written = Written::default();
        written.status(&of("1", "2"), Some("1".to_owned()));
        assert!(written.is_ahead_of(&of("1", "1")) && !written.is_ahead_of(&of("1", "2")));
        // A write that changed nothing.
        written.status(&of("1", "2"), Some("2".to_owned()));
        assert!(!written.is_ahead_of(&of("1", "2")));
    }
}
