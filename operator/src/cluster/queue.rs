//! A queue of objects of one kind: first in, first out, however long it gets. Objects whose spec nobody has looked at yet, for which
//! somebody waits, come before those whose children have changed, but take no more than three turns of four.
//!
//! kube's own runner takes what it holds in no order: with a backlog, some objects would wait for as long as others come.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Poll, Waker};
use std::time::Duration;

use futures::Stream;
use kube::Resource;
use kube::runtime::reflector::{ObjectRef, Store};
use tokio_util::time::{DelayQueue, delay_queue};

use super::caches::Guarded;

/// How many objects may come out of the first lane in a row while others wait in the second.
const IN_A_ROW: usize = 3;

/// Objects that somebody has to look at.
pub struct Queue<K: Resource<DynamicType = ()>>(Arc<Mutex<State<K>>>);

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Lane {
    /// Nobody has looked at the spec.
    Spec,
    /// All others.
    World,
}

struct State<K: Resource<DynamicType = ()>> {
    /// The lane of each object that waits.
    waiting: HashMap<ObjectRef<Guarded<K>>, Lane>,
    /// Those that wait, in order, and are not looked at; also some that have changed the lane, or come out, since.
    lanes: [VecDeque<ObjectRef<Guarded<K>>>; 2],
    /// Came out of the first lane one after another.
    in_a_row: usize,
    /// Somebody looks at these.
    running: HashSet<ObjectRef<Guarded<K>>>,
    /// These wait for their time.
    later: DelayQueue<ObjectRef<Guarded<K>>>,
    keys: HashMap<ObjectRef<Guarded<K>>, delay_queue::Key>,
    waker: Option<Waker>,
}

impl<K: Resource<DynamicType = ()>> Clone for Queue<K> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<K: Resource<DynamicType = ()>> Default for Queue<K> {
    fn default() -> Self {
        Self(Arc::new(Mutex::new(State {
            waiting: HashMap::new(),
            lanes: Default::default(),
            in_a_row: 0,
            running: HashSet::new(),
            later: DelayQueue::new(),
            keys: HashMap::new(),
            waker: None,
        })))
    }
}

impl<K: Resource<DynamicType = ()> + Clone + 'static> Queue<K> {
    /// Puts an object in, unless it waits already.
    pub fn push(&self, namespace: &str, name: &str) {
        self.state().enter(ObjectRef::new(name).within(namespace), Lane::World);
    }

    /// Puts an object in whose spec nobody has looked at.
    pub fn push_ahead(&self, namespace: &str, name: &str) {
        self.state().enter(ObjectRef::new(name).within(namespace), Lane::Spec);
    }

    /// The objects to look at, each when the look before it has [ended](Self::ended); without end.
    pub fn objects(&self) -> impl Stream<Item = ObjectRef<Guarded<K>>> + use<K> {
        let queue = self.clone();
        futures::stream::poll_fn(move |context| {
            let mut state = queue.state();
            while let Poll::Ready(Some(due)) = state.later.poll_expired(context) {
                let object = due.into_inner();
                state.keys.remove(&object);
                state.enter(object, Lane::World);
            }
            state.waker = Some(context.waker().clone());
            state.next().map_or(Poll::Pending, |object| Poll::Ready(Some(object)))
        })
    }

    /// The look at an object that came out is over; it comes out again after that time, or when it is put in.
    pub fn ended(&self, object: ObjectRef<Guarded<K>>, again: Option<Duration>) {
        let mut state = self.state();
        state.running.remove(&object);
        if let Some(lane) = state.waiting.get(&object).copied() {
            state.lanes[lane as usize].push_back(object);
        } else if let Some(again) = again {
            let key = state.later.insert(object.clone(), again);
            state.keys.insert(object, key);
        }
        state.wake();
    }

    /// Objects that exist and wait.
    pub fn length(&self, store: &Store<Guarded<K>>) -> usize {
        self.state().waiting.keys().filter(|object| store.get(object).is_some()).count()
    }

    fn state(&self) -> MutexGuard<'_, State<K>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<K: Resource<DynamicType = ()> + Clone + 'static> State<K> {
    fn enter(&mut self, object: ObjectRef<Guarded<K>>, lane: Lane) {
        if self.waiting.get(&object).is_some_and(|present| *present <= lane) {
            return;
        }
        self.waiting.insert(object.clone(), lane);
        if !self.running.contains(&object) {
            self.lanes[lane as usize].push_back(object);
            self.wake();
        }
    }

    fn next(&mut self) -> Option<ObjectRef<Guarded<K>>> {
        let order = if self.in_a_row < IN_A_ROW { [Lane::Spec, Lane::World] } else { [Lane::World, Lane::Spec] };
        let (lane, object) = order.into_iter().find_map(|lane| Some((lane, self.first(lane)?)))?;
        self.in_a_row = if lane == Lane::Spec { self.in_a_row + 1 } else { 0 };
        self.waiting.remove(&object);
        self.running.insert(object.clone());
        if let Some(key) = self.keys.remove(&object) {
            self.later.remove(&key);
        }
        Some(object)
    }

    fn first(&mut self, lane: Lane) -> Option<ObjectRef<Guarded<K>>> {
        loop {
            let object = self.lanes[lane as usize].pop_front()?;
            if self.waiting.get(&object) == Some(&lane) && !self.running.contains(&object) {
                return Some(object);
            }
        }
    }

    fn wake(&mut self) {
        self.waker.take().into_iter().for_each(Waker::wake);
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

    fn object(name: &str) -> ObjectRef<Guarded<BaseModelPool>> {
        ObjectRef::new(name).within("space")
    }

    /// What comes out now, each name once.
    fn all(objects: &mut (impl Stream<Item = ObjectRef<Guarded<BaseModelPool>>> + Unpin)) -> Vec<String> {
        std::iter::from_fn(|| objects.next().now_or_never().flatten()).map(|object| object.name).collect()
    }

    #[tokio::test]
    async fn objects_come_out_in_order_once_and_not_while_they_are_looked_at() {
        let queue = Queue::<BaseModelPool>::default();
        let mut objects = queue.objects().boxed();
        ["c", "a", "c", "b"].iter().for_each(|name| queue.push("space", name));
        assert_eq!(all(&mut objects), ["c", "a", "b"]);
        queue.push("space", "a");
        queue.push("space", "c");
        queue.push("space", "a");
        assert_eq!(all(&mut objects), [""; 0]);
        queue.ended(object("b"), None);
        queue.ended(object("a"), None);
        queue.push("space", "b");
        queue.ended(object("c"), None);
        assert_eq!(all(&mut objects), ["a", "b", "c"]);
    }

    #[tokio::test]
    async fn those_with_a_new_spec_come_first_but_do_not_keep_the_others_from_coming() {
        let queue = Queue::<BaseModelPool>::default();
        let mut objects = queue.objects().boxed();
        ["w1", "w2", "s1", "w3"].iter().for_each(|name| queue.push("space", name));
        ["s1", "s2", "s3", "s4", "s5"].iter().for_each(|name| queue.push_ahead("space", name));
        queue.push("space", "s5");
        assert_eq!(all(&mut objects), ["s1", "s2", "s3", "w1", "s4", "s5", "w2", "w3"]);
        queue.push("space", "w1");
        queue.push_ahead("space", "w1");
        queue.push("space", "s1");
        queue.ended(object("s1"), None);
        queue.ended(object("w1"), None);
        assert_eq!(all(&mut objects), ["w1", "s1"]);
    }

    #[tokio::test]
    async fn an_object_comes_out_when_its_time_has_come_or_before_when_it_is_put_in() {
        let queue = Queue::<BaseModelPool>::default();
        let mut objects = queue.objects().boxed();
        ["a", "b", "c"].iter().for_each(|name| queue.push("space", name));
        assert_eq!(all(&mut objects), ["a", "b", "c"]);
        queue.ended(object("b"), Some(Duration::from_secs(3600)));
        // Put in while it was looked at: the next look says when the one after it is due.
        queue.push("space", "c");
        queue.ended(object("c"), Some(Duration::from_secs(3600)));
        assert_eq!(all(&mut objects), ["c"]);
        queue.ended(object("a"), Some(Duration::from_millis(20)));
        assert_eq!(objects.next().await.unwrap().name, "a");
        queue.push("space", "b");
        assert_eq!(all(&mut objects), ["b"]);
        let waits = tokio::spawn(async move { objects.next().await.unwrap().name });
        tokio::task::yield_now().await;
        queue.ended(object("a"), Some(Duration::from_millis(1)));
        assert_eq!(waits.await.unwrap(), "a");
    }

    #[test]
    fn only_what_exists_is_counted() {
        let (reader, mut writer) = store();
        let pool = json!({"metadata": {"name": "a", "namespace": "space"}, "spec": {"model": {"source": {}}}});
        writer.apply_watcher_event(&Event::Apply(serde_json::from_value(pool).unwrap()));
        let queue = Queue::<BaseModelPool>::default();
        ["a", "gone", "a"].iter().for_each(|name| queue.push("space", name));
        assert_eq!(queue.length(&reader), 1);
    }
}
