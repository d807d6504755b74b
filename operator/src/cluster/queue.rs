//! A queue of objects of one kind, and how long it is.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kube::Resource;
use kube::runtime::reflector::{ObjectRef, Store};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use super::caches::Guarded;

/// Objects that somebody has to look at.
pub struct Queue<K: Resource<DynamicType = ()>> {
    sender: UnboundedSender<ObjectRef<Guarded<K>>>,
    waiting: Arc<Mutex<HashSet<ObjectRef<Guarded<K>>>>>,
}

impl<K: Resource<DynamicType = ()>> Clone for Queue<K> {
    fn clone(&self) -> Self {
        Self { sender: self.sender.clone(), waiting: self.waiting.clone() }
    }
}

impl<K: Resource<DynamicType = ()> + Clone + 'static> Queue<K> {
    /// An empty queue, and where its objects come out.
    pub fn new() -> (Self, UnboundedReceiver<ObjectRef<Guarded<K>>>) {
        let (sender, receiver) = unbounded_channel();
        (Self { sender, waiting: Arc::default() }, receiver)
    }

    /// Puts an object in.
    pub fn push(&self, namespace: &str, name: &str) {
        let object = ObjectRef::new(name).within(namespace);
        self.waiting().insert(object.clone());
        // Nobody listens any more when the operator is about to end.
        let _ = self.sender.send(object);
    }

    /// Somebody looks at the object now.
    pub fn begun(&self, object: &ObjectRef<Guarded<K>>) {
        self.waiting().remove(object);
    }

    /// Objects that exist and wait.
    pub fn length(&self, store: &Store<Guarded<K>>) -> usize {
        let mut waiting = self.waiting();
        // Nobody ever looks at one that is gone.
        waiting.retain(|object| store.get(object).is_some());
        waiting.len()
    }

    fn waiting(&self) -> MutexGuard<'_, HashSet<ObjectRef<Guarded<K>>>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use carryon_crds::BaseModelPool;
    use kube::core::DeserializeGuard;
    use kube::runtime::reflector::store;
    use kube::runtime::watcher::Event;
    use serde_json::json;

    use super::*;

    #[test]
    fn an_object_waits_once_until_it_is_looked_at_or_gone() {
        let (reader, mut writer) = store();
        for name in ["a", "b"] {
            let pool = json!({"metadata": {"name": name, "namespace": "space"}, "spec": {"model": {"source": {}}}});
            writer.apply_watcher_event(&Event::Apply(serde_json::from_value::<DeserializeGuard<BaseModelPool>>(pool).unwrap()));
        }
        let (queue, mut to_do) = Queue::<BaseModelPool>::new();
        ["a", "b", "a", "gone"].iter().for_each(|name| queue.push("space", name));
        assert_eq!(queue.length(&reader), 2);
        queue.begun(&to_do.try_recv().unwrap());
        assert_eq!(queue.length(&reader), 1);
        assert_eq!(to_do.len(), 3);
    }
}
