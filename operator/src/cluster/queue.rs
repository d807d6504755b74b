//! A queue of objects of one kind: first in, first out, however long it gets. Somebody waits for those whose spec nobody has looked at yet:
//! beside them, only a few are looked at whose children have changed. Children change in bursts, and the caches hear of one in no order: such
//! an object comes out a moment later, once for all of it.
//!
//! kube's own runner takes what it holds in no order: with a backlog, some objects would wait for as long as others come.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Poll, Waker};
use std::time::Duration;

use futures::Stream;
use kube::Resource;
use kube::runtime::reflector::{ObjectRef, Store};
use tokio::time::Instant;
use tokio_util::time::{DelayQueue, delay_queue};

use super::caches::Guarded;

/// From a change of an object's children to the look at it; what changes until then is seen in the same look.
const SETTLE: Duration = Duration::from_millis(500);
/// How many objects may be looked at for their children's sake, and before all others, while a new spec is.
const BESIDE: usize = 4;
/// How many while none is.
const ALONE: usize = 64;

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
    /// Somebody looks at these, out of that lane.
    running: HashMap<ObjectRef<Guarded<K>>, Lane>,
    /// These wait for their time, each once.
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
            running: HashMap::new(),
            later: DelayQueue::new(),
            keys: HashMap::new(),
            waker: None,
        })))
    }
}

impl<K: Resource<DynamicType = ()> + Clone + 'static> Queue<K> {
    /// Puts an object in whose children, or what it refers to, have changed; it comes out in half a second, unless it waits already.
    pub fn push(&self, namespace: &str, name: &str) {
        self.state().enter_in(ObjectRef::new(name).within(namespace), SETTLE);
    }

    /// Puts an object in whose spec nobody has looked at; it comes out at once.
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
            state.enter_in(object, again);
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
    /// Enters after that time, or before, when it waits for an earlier one.
    fn enter_in(&mut self, object: ObjectRef<Guarded<K>>, wait: Duration) {
        if self.waiting.contains_key(&object) {
            return;
        }
        match self.keys.get(&object) {
            Some(key) if self.later.deadline(key) <= Instant::now() + wait => return,
            Some(key) => self.later.reset(key, wait),
            None => {
                let key = self.later.insert(object.clone(), wait);
                self.keys.insert(object, key);
            }
        }
        self.wake();
    }

    fn enter(&mut self, object: ObjectRef<Guarded<K>>, lane: Lane) {
        if self.waiting.get(&object).is_some_and(|present| *present <= lane) {
            return;
        }
        self.waiting.insert(object.clone(), lane);
        if !self.running.contains_key(&object) {
            self.lanes[lane as usize].push_back(object);
            self.wake();
        }
    }

    fn next(&mut self) -> Option<ObjectRef<Guarded<K>>> {
        let running = |lane| self.running.values().filter(|of| **of == lane).count();
        let order: &[Lane] = match (running(Lane::Spec), running(Lane::World)) {
            (_, ..BESIDE) => &[Lane::World, Lane::Spec],
            (0, ..ALONE) => &[Lane::Spec, Lane::World],
            _ => &[Lane::Spec],
        };
        let (lane, object) = order.iter().find_map(|lane| Some((*lane, self.first(*lane)?)))?;
        self.waiting.remove(&object);
        self.running.insert(object.clone(), lane);
        if let Some(key) = self.keys.remove(&object) {
            self.later.remove(&key);
        }
        Some(object)
    }

    fn first(&mut self, lane: Lane) -> Option<ObjectRef<Guarded<K>>> {
        loop {
            let object = self.lanes[lane as usize].pop_front()?;
            if self.waiting.get(&object) == Some(&lane) && !self.running.contains_key(&object) {
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

    /// A change of children of each, one a moment after the other.
    async fn change(queue: &Queue<BaseModelPool>, names: &[&str]) {
        for name in names {
            queue.push("space", name);
            tokio::time::sleep(Duration::from_millis(3)).await;
        }
    }

    /// What comes out now, each name once.
    fn now(objects: &mut (impl Stream<Item = ObjectRef<Guarded<BaseModelPool>>> + Unpin)) -> Vec<String> {
        std::iter::from_fn(|| objects.next().now_or_never().flatten()).map(|object| object.name).collect()
    }

    /// What comes out when all that has changed is settled.
    async fn settled(objects: &mut (impl Stream<Item = ObjectRef<Guarded<BaseModelPool>>> + Unpin)) -> Vec<String> {
        tokio::time::sleep(SETTLE + Duration::from_millis(50)).await;
        now(objects)
    }

    #[tokio::test]
    async fn objects_come_out_in_order_once_and_not_while_they_are_looked_at() {
        let queue = Queue::<BaseModelPool>::default();
        let mut objects = queue.objects().boxed();
        change(&queue, &["c", "a", "c", "b"]).await;
        assert_eq!(settled(&mut objects).await, ["c", "a", "b"]);
        change(&queue, &["a", "c", "a"]).await;
        assert_eq!(settled(&mut objects).await, [""; 0]);
        queue.ended(object("b"), None);
        queue.ended(object("a"), None);
        assert_eq!(now(&mut objects), ["a"]);
        change(&queue, &["b"]).await;
        queue.ended(object("c"), None);
        assert_eq!(now(&mut objects), ["c"]);
        assert_eq!(settled(&mut objects).await, ["b"]);
    }

    #[tokio::test]
    async fn beside_those_with_a_new_spec_only_a_few_others_are_looked_at() {
        let queue = Queue::<BaseModelPool>::default();
        let mut objects = queue.objects().boxed();
        let changed: Vec<String> = (0..7).map(|number| format!("w{number}")).collect();
        change(&queue, &changed.iter().map(String::as_str).chain(["s1"]).collect::<Vec<_>>()).await;
        tokio::time::sleep(SETTLE).await;
        ["s1", "s2", "s3"].iter().for_each(|name| queue.push_ahead("space", name));
        queue.push("space", "s3");
        assert_eq!(now(&mut objects), ["w0", "w1", "w2", "w3", "s1", "s2", "s3"]);
        assert_eq!(settled(&mut objects).await, [""; 0]);
        queue.ended(object("w1"), None);
        assert_eq!(now(&mut objects), ["w4"]);
        ["s1", "s3"].iter().for_each(|name| queue.ended(object(name), None));
        queue.push_ahead("space", "w2");
        queue.ended(object("w2"), None);
        assert_eq!(now(&mut objects), ["w5", "w2"]);
        ["s2", "w2"].iter().for_each(|name| queue.ended(object(name), None));
        assert_eq!(now(&mut objects), ["w6"]);
        // Those that wait for their children's sake, looked at or not, go ahead when their spec is new.
        change(&queue, &["w6", "w7", "w8"]).await;
        queue.push_ahead("space", "s4");
        assert_eq!(settled(&mut objects).await, ["s4"]);
        ["w8", "w6"].iter().for_each(|name| queue.push_ahead("space", name));
        queue.ended(object("w6"), None);
        assert_eq!(now(&mut objects), ["w8", "w6"]);
        queue.ended(object("w0"), None);
        assert_eq!(now(&mut objects), ["w7"]);
    }

    #[tokio::test]
    async fn an_object_comes_out_when_its_time_has_come_or_before_when_it_is_put_in() {
        let queue = Queue::<BaseModelPool>::default();
        let mut objects = queue.objects().boxed();
        ["a", "b", "c"].iter().for_each(|name| queue.push_ahead("space", name));
        assert_eq!(now(&mut objects), ["a", "b", "c"]);
        queue.ended(object("b"), Some(Duration::from_secs(3600)));
        // Put in while it was looked at: it comes out for that, whatever the look says.
        change(&queue, &["c"]).await;
        queue.ended(object("c"), Some(Duration::from_secs(3600)));
        assert_eq!(settled(&mut objects).await, ["c"]);
        queue.ended(object("a"), Some(Duration::from_millis(20)));
        assert_eq!(objects.next().await.unwrap().name, "a");
        let changed = Instant::now();
        queue.push("space", "b");
        assert_eq!(objects.next().await.unwrap().name, "b");
        assert!(changed.elapsed() >= SETTLE);
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
        ["a", "gone", "a"].iter().for_each(|name| queue.push_ahead("space", name));
        assert_eq!(queue.length(&reader), 1);
    }
}
