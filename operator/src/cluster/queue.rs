//! A queue of objects of one kind: first in, first out, however long it gets; but those whose spec nobody has looked at yet,
//! for which somebody waits, come before those whose children have changed.
//!
//! kube's runner starts what it holds in no order, so that some objects would wait for as long as others come. It is handed one at a time,
//! when it can start one, and none that it is at work on: such an object goes to the end of the queue when the work is done.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures::Stream;
use kube::Resource;
use kube::runtime::reflector::{ObjectRef, Store};
use tokio::sync::Notify;

use super::caches::Guarded;

/// Objects that somebody has to look at.
pub struct Queue<K: Resource<DynamicType = ()>>(Arc<Shared<K>>);

struct Shared<K: Resource<DynamicType = ()>> {
    state: Mutex<State<K>>,
    changed: Notify,
}

/// Those in an earlier lane come first.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Lane {
    /// Nobody has looked at the spec.
    Spec,
    /// All others.
    World,
}

struct State<K: Resource<DynamicType = ()>> {
    /// By lane, those of `waiting` that nobody is at work on, and some that were begun from elsewhere since.
    order: [VecDeque<ObjectRef<Guarded<K>>>; 2],
    waiting: HashMap<ObjectRef<Guarded<K>>, Lane>,
    running: HashSet<ObjectRef<Guarded<K>>>,
    /// Came out and is not begun.
    handed: Option<ObjectRef<Guarded<K>>>,
}

impl<K: Resource<DynamicType = ()>> Clone for Queue<K> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<K: Resource<DynamicType = ()>> Default for Queue<K> {
    fn default() -> Self {
        let state = State { order: Default::default(), waiting: HashMap::new(), running: HashSet::new(), handed: None };
        Self(Arc::new(Shared { state: Mutex::new(state), changed: Notify::new() }))
    }
}

impl<K: Resource<DynamicType = ()> + Clone + 'static> Queue<K> {
    /// Puts an object in, unless it waits already.
    pub fn push(&self, namespace: &str, name: &str) {
        self.enter(namespace, name, Lane::World);
    }

    /// Puts an object in whose spec nobody has looked at.
    pub fn push_ahead(&self, namespace: &str, name: &str) {
        self.enter(namespace, name, Lane::Spec);
    }

    fn enter(&self, namespace: &str, name: &str, lane: Lane) {
        let object = ObjectRef::new(name).within(namespace);
        let mut state = self.state();
        let waits = state.waiting.get(&object).copied();
        if state.handed.take_if(|handed| *handed == object).is_some() {
            // It may have been gone, and be another now: then nobody begins what was handed out.
            state.order[Lane::Spec as usize].push_front(object);
        } else if waits.is_none_or(|waits| lane < waits) {
            state.waiting.insert(object.clone(), lane);
            if !state.running.contains(&object) {
                state.order[lane as usize].push_back(object);
            }
        }
        self.0.changed.notify_one();
    }

    /// Somebody looks at the object now, asked by the queue or by a timer.
    pub fn begun(&self, object: &ObjectRef<Guarded<K>>) {
        let mut state = self.state();
        state.waiting.remove(object);
        state.running.insert(object.clone());
        state.handed.take_if(|handed| handed == object);
        self.0.changed.notify_one();
    }

    /// The look is over.
    pub fn ended(&self, object: &ObjectRef<Guarded<K>>) {
        let mut state = self.state();
        state.running.remove(object);
        if let Some(lane) = state.waiting.get(object).copied() {
            state.order[lane as usize].push_back(object.clone());
        }
        self.0.changed.notify_one();
    }

    /// The objects to look at, each when the one before it is begun or gone.
    pub fn objects(&self, store: Store<Guarded<K>>) -> impl Stream<Item = ObjectRef<Guarded<K>>> + use<K> {
        futures::stream::unfold((self.clone(), store), async |(queue, store)| {
            loop {
                if let Some(object) = queue.hand_out(&store) {
                    return Some((object, (queue, store)));
                }
                queue.0.changed.notified().await;
            }
        })
    }

    fn hand_out(&self, store: &Store<Guarded<K>>) -> Option<ObjectRef<Guarded<K>>> {
        let mut state = self.state();
        // Deleted while nobody watched: nothing pushes it again, and nobody begins it.
        if let Some(gone) = state.handed.take_if(|handed| store.get(handed).is_none()) {
            state.order[Lane::Spec as usize].push_front(gone);
        }
        while state.handed.is_none() {
            let object = state.order.iter_mut().find_map(VecDeque::pop_front)?;
            if store.get(&object).is_none() {
                // Nobody ever looks at one that is gone.
                state.waiting.remove(&object);
            } else if state.waiting.contains_key(&object) && !state.running.contains(&object) {
                state.handed = Some(object.clone());
                return Some(object);
            }
        }
        None
    }

    /// Objects that exist and wait.
    pub fn length(&self, store: &Store<Guarded<K>>) -> usize {
        self.state().waiting.keys().filter(|object| store.get(object).is_some()).count()
    }

    fn state(&self) -> MutexGuard<'_, State<K>> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use carryon_crds::BaseModelPool;
    use futures::{FutureExt as _, StreamExt as _};
    use kube::runtime::reflector::store;
    use kube::runtime::watcher::Event;
    use serde_json::json;

    use super::*;

    fn pool(name: &str) -> Guarded<BaseModelPool> {
        let pool = json!({"metadata": {"name": name, "namespace": "space"}, "spec": {"model": {"source": {}}}});
        serde_json::from_value(pool).unwrap()
    }

    fn object(name: &str) -> ObjectRef<Guarded<BaseModelPool>> {
        ObjectRef::new(name).within("space")
    }

    #[test]
    fn objects_come_out_in_order_once_and_not_while_they_are_looked_at() {
        let (reader, mut writer) = store();
        ["a", "b", "c", "d"].iter().for_each(|name| writer.apply_watcher_event(&Event::Apply(pool(name))));
        let queue = Queue::<BaseModelPool>::default();
        let mut objects = queue.objects(reader.clone()).boxed();
        let mut next = || objects.next().now_or_never().map(|object| object.unwrap().name);
        ["gone", "c", "a", "c", "b", "d"].iter().for_each(|name| queue.push("space", name));
        assert_eq!(queue.length(&reader), 4);

        assert_eq!((next().as_deref(), next()), (Some("c"), None));
        queue.begun(&object("c"));
        queue.push("space", "c");
        assert_eq!(queue.length(&reader), 4);
        // A timer is quicker than the queue.
        queue.begun(&object("a"));
        queue.ended(&object("a"));
        assert_eq!((next().as_deref(), next()), (Some("b"), None));
        queue.begun(&object("b"));
        queue.ended(&object("c"));
        assert_eq!((next().as_deref(), next()), (Some("d"), None));
        // Deleted while nobody watched; the next change of any object is noticed.
        writer.apply_watcher_event(&Event::Delete(pool("d")));
        queue.push("space", "a");
        assert_eq!((next().as_deref(), next()), (Some("c"), None));
        queue.begun(&object("c"));
        queue.ended(&object("c"));
        assert_eq!((next().as_deref(), next()), (Some("a"), None));
        queue.begun(&object("a"));
        queue.ended(&object("a"));
        // Each change of an object pushes it, its deletion too.
        writer.apply_watcher_event(&Event::Apply(pool("d")));
        ["d", "c"].iter().for_each(|name| queue.push("space", name));
        assert_eq!((next().as_deref(), next()), (Some("d"), None));
        writer.apply_watcher_event(&Event::Delete(pool("d")));
        queue.push("space", "d");
        assert_eq!((next().as_deref(), next()), (Some("c"), None));
        queue.begun(&object("c"));
        assert_eq!((next(), queue.length(&reader)), (None, 0));
        writer.apply_watcher_event(&Event::Apply(pool("d")));
        queue.push("space", "d");
        assert_eq!((next().as_deref(), next()), (Some("d"), None));
        queue.push("space", "d");
        assert_eq!((next().as_deref(), next()), (Some("d"), None));
        queue.begun(&object("d"));
        assert_eq!((next(), queue.length(&reader)), (None, 0));
    }

    #[test]
    fn those_with_a_new_spec_come_first() {
        let (reader, mut writer) = store();
        ["a", "b", "c", "d"].iter().for_each(|name| writer.apply_watcher_event(&Event::Apply(pool(name))));
        let queue = Queue::<BaseModelPool>::default();
        let mut objects = queue.objects(reader.clone()).boxed();
        let mut look = || {
            let next = objects.next().now_or_never().map(|object| object.unwrap().name);
            next.inspect(|name| {
                queue.begun(&object(name));
                queue.ended(&object(name));
            })
        };
        queue.push("space", "a");
        queue.push("space", "b");
        queue.push_ahead("space", "c");
        queue.push_ahead("space", "b");
        queue.push("space", "c");
        assert_eq!([look(), look(), look(), look()].map(Option::unwrap_or_default), ["c", "b", "a", ""]);

        queue.begun(&object("d"));
        queue.push("space", "a");
        queue.push("space", "d");
        queue.push_ahead("space", "d");
        queue.ended(&object("d"));
        assert_eq!([look(), look(), look()].map(Option::unwrap_or_default), ["d", "a", ""]);
    }
}
