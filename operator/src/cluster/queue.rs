//! Keys of objects to reconcile: first in, first out, however many there are, and one reconcile at a time for each.
//!
//! Somebody waits for an object whose spec is new; beside such, only a few are reconciled because something around them has changed. Children
//! change in bursts, and the caches hear of one in no order: such a key comes out half a second later, once for all of it.
//!
//! kube-runtime's scheduler and runner take what they hold in no order: with a backlog, some objects would wait for as long as others come.

use std::collections::{BTreeMap, HashMap};
use std::sync::Mutex;
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::{Instant, timeout_at};

use super::key::{Key, Kind};
use super::lock::lock;

/// From a change around an object to its reconcile; what changes until then is seen by the same one.
const SETTLE: Duration = Duration::from_millis(500);
/// How many objects may be reconciled for what is around them, and before all others, while a new spec is.
const BESIDE: usize = 4;
/// How many while none is.
const ALONE: usize = 64;

/// Why an object is reconciled; the more urgent first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Lane {
    /// Its spec is new.
    NewSpec,
    /// Its children or what it refers to have changed, or its time has come.
    Around,
}

/// Keys of objects that have to be reconciled.
#[derive(Default)]
pub struct Queue {
    state: Mutex<State>,
    changed: Notify,
}

impl Queue {
    /// Puts a key in, unless it waits already.
    pub fn push(&self, key: Key, lane: Lane) {
        lock(&self.state).push(key, lane, Instant::now());
        self.changed.notify_one();
    }

    /// The next key, when there is one; it is [`done`](Self::done) before it comes out again.
    pub async fn pop(&self) -> Key {
        loop {
            let due = match lock(&self.state).pop(Instant::now()) {
                Ok(key) => return key,
                Err(due) => due,
            };
            let changed = self.changed.notified();
            match due {
                Some(due) => timeout_at(due, changed).await.unwrap_or_default(),
                None => changed.await,
            }
        }
    }

    /// The reconcile is over; the key comes out again after `requeue`, or when it is put in.
    pub fn done(&self, key: &Key, requeue: Option<Duration>) {
        lock(&self.state).done(key, requeue.map(|requeue| Instant::now() + requeue));
        self.changed.notify_one();
    }

    /// How many keys of a kind wait for nothing but their turn.
    pub fn length(&self, kind: Kind) -> usize {
        let (state, now) = (lock(&self.state), Instant::now());
        state.waiting.iter().filter(|(key, place)| key.kind == kind && place.turn.due <= now).count()
    }
}

/// When a key may come out, and of which lane; the more urgent first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Turn {
    lane: Lane,
    due: Instant,
}

/// A turn, and its number among those of the same moment.
#[derive(Clone, Copy)]
struct Place {
    turn: Turn,
    number: u64,
}

/// A key that is being reconciled.
struct Running {
    /// The lane that it came from.
    lane: Lane,
    /// Its next turn, when it has been put in since.
    again: Option<Turn>,
}

#[derive(Default)]
struct State {
    waiting: HashMap<Key, Place>,
    /// The same in order.
    lanes: [BTreeMap<(Instant, u64), Key>; 2],
    running: HashMap<Key, Running>,
    /// Of the last place.
    number: u64,
}

impl State {
    fn push(&mut self, key: Key, lane: Lane, now: Instant) {
        let due = if lane == Lane::NewSpec { now } else { now + SETTLE };
        self.enter(key, Turn { lane, due });
    }

    /// Gives a key its turn, unless it has one as urgent.
    fn enter(&mut self, key: Key, turn: Turn) {
        if let Some(running) = self.running.get_mut(&key) {
            running.again = Some(running.again.map_or(turn, |again| again.min(turn)));
            return;
        }
        if let Some(known) = self.waiting.get(&key) {
            if known.turn <= turn {
                return;
            }
            self.lanes[known.turn.lane as usize].remove(&(known.turn.due, known.number));
        }
        self.number += 1;
        self.lanes[turn.lane as usize].insert((turn.due, self.number), key.clone());
        self.waiting.insert(key, Place { turn, number: self.number });
    }

    /// The next key, or when there may be one without anything happening before.
    fn pop(&mut self, now: Instant) -> Result<Key, Option<Instant>> {
        let mut next_due: Option<Instant> = None;
        for lane in self.open_lanes() {
            let Some(first) = self.lanes[*lane as usize].first_entry() else { continue };
            let (due, _) = *first.key();
            if due <= now {
                let key = first.remove();
                self.waiting.remove(&key);
                self.running.insert(key.clone(), Running { lane: *lane, again: None });
                return Ok(key);
            }
            next_due = Some(next_due.map_or(due, |other| other.min(due)));
        }
        Err(next_due)
    }

    /// The lanes of which a key may come out now, in the order in which they are looked at.
    fn open_lanes(&self) -> &'static [Lane] {
        let running = |lane| self.running.values().filter(|running| running.lane == lane).count();
        match (running(Lane::NewSpec), running(Lane::Around)) {
            (_, ..BESIDE) => &[Lane::Around, Lane::NewSpec],
            (0, ..ALONE) => &[Lane::NewSpec, Lane::Around],
            _ => &[Lane::NewSpec],
        }
    }

    fn done(&mut self, key: &Key, requeue: Option<Instant>) {
        let again = self.running.remove(key).and_then(|running| running.again);
        let requeue = requeue.map(|due| Turn { lane: Lane::Around, due });
        if let Some(turn) = again.into_iter().chain(requeue).min() {
            self.enter(key.clone(), turn);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A queue and a clock that is set by hand.
    struct Played {
        state: State,
        now: Instant,
    }

    impl Played {
        fn new() -> Self {
            Self { state: State::default(), now: Instant::now() }
        }

        /// Something around each changes, one a moment after the other.
        fn change(&mut self, names: &[&str]) {
            names.iter().for_each(|name| self.push(name, Lane::Around));
        }

        fn push(&mut self, name: &str, lane: Lane) {
            self.now += Duration::from_millis(3);
            self.state.push(key(name), lane, self.now);
        }

        fn done(&mut self, name: &str, requeue: Option<Duration>) {
            self.state.done(&key(name), requeue.map(|requeue| self.now + requeue));
        }

        /// What comes out now.
        fn pop(&mut self) -> Vec<String> {
            std::iter::from_fn(|| self.state.pop(self.now).ok()).map(|key| key.name).collect()
        }

        /// What comes out a while later.
        fn pop_after(&mut self, wait: Duration) -> Vec<String> {
            self.now += wait;
            self.pop()
        }
    }

    fn key(name: &str) -> Key {
        Key { kind: Kind::Pool, namespace: "team".to_owned(), name: name.to_owned() }
    }

    #[test]
    fn keys_come_out_in_order_once_and_not_while_they_are_reconciled() {
        let mut queue = Played::new();
        queue.change(&["c", "a", "c", "b"]);
        assert_eq!(queue.pop(), [""; 0]);
        assert_eq!(queue.pop_after(SETTLE), ["c", "a", "b"]);
        queue.change(&["a", "c", "a"]);
        assert_eq!(queue.pop_after(SETTLE), [""; 0]);
        queue.done("b", None);
        queue.done("a", None);
        assert_eq!(queue.pop(), ["a"]);
        queue.change(&["b"]);
        queue.done("c", None);
        assert_eq!(queue.pop(), ["c"]);
        assert_eq!(queue.pop_after(SETTLE), ["b"]);
    }

    #[test]
    fn beside_those_with_a_new_spec_only_a_few_others_are_reconciled() {
        let mut queue = Played::new();
        queue.change(&["w0", "w1", "w2", "w3", "w4", "w5", "w6", "s1"]);
        queue.now += SETTLE;
        ["s1", "s2", "s3"].iter().for_each(|name| queue.push(name, Lane::NewSpec));
        queue.push("s3", Lane::Around);
        assert_eq!(queue.pop(), ["w0", "w1", "w2", "w3", "s1", "s2", "s3"]);
        assert_eq!(queue.pop_after(SETTLE), [""; 0]);
        queue.done("w1", None);
        assert_eq!(queue.pop(), ["w4"]);
        ["s1", "s3"].iter().for_each(|name| queue.done(name, None));
        queue.push("w2", Lane::NewSpec);
        queue.done("w2", None);
        assert_eq!(queue.pop(), ["w5", "w2"]);
        ["s2", "w2"].iter().for_each(|name| queue.done(name, None));
        assert_eq!(queue.pop(), ["w6"]);
        // Those that wait for what is around them, reconciled now or not, go ahead when their spec is new.
        queue.change(&["w6", "w7", "w8"]);
        queue.push("s4", Lane::NewSpec);
        assert_eq!(queue.pop_after(SETTLE), ["s4"]);
        ["w8", "w6"].iter().for_each(|name| queue.push(name, Lane::NewSpec));
        queue.done("w6", None);
        assert_eq!(queue.pop(), ["w8", "w6"]);
        queue.done("w0", None);
        assert_eq!(queue.pop(), ["w7"]);
    }

    #[test]
    fn a_key_comes_out_when_its_time_has_come_or_before_when_it_is_put_in() {
        const HOUR: Duration = Duration::from_secs(3600);
        let mut queue = Played::new();
        ["a", "b", "c"].iter().for_each(|name| queue.push(name, Lane::NewSpec));
        assert_eq!(queue.pop(), ["a", "b", "c"]);
        queue.done("b", Some(HOUR));
        // Put in while it was reconciled: it comes out for that, whatever its reconcile says.
        queue.change(&["c"]);
        queue.done("c", Some(HOUR));
        assert_eq!(queue.pop_after(SETTLE), ["c"]);
        queue.done("a", Some(Duration::from_millis(20)));
        assert_eq!(queue.state.pop(queue.now), Err(Some(queue.now + Duration::from_millis(20))));
        assert_eq!(queue.pop_after(Duration::from_millis(20)), ["a"]);
        queue.change(&["b"]);
        assert_eq!(queue.pop_after(SETTLE - Duration::from_millis(1)), [""; 0]);
        assert_eq!(queue.pop_after(Duration::from_millis(1)), ["b"]);
        queue.done("b", Some(HOUR));
        assert_eq!(queue.pop_after(HOUR), ["b"]);
    }

    #[tokio::test]
    async fn who_waits_is_woken_by_what_is_put_in_and_by_time() {
        let queue = std::sync::Arc::new(Queue::default());
        let popped = |queue: &std::sync::Arc<Queue>| {
            let queue = queue.clone();
            tokio::spawn(async move { queue.pop().await.name })
        };
        let waits = popped(&queue);
        tokio::task::yield_now().await;
        queue.push(key("a"), Lane::NewSpec);
        assert_eq!(waits.await.unwrap(), "a");
        let waits = popped(&queue);
        tokio::task::yield_now().await;
        queue.done(&key("a"), Some(Duration::from_millis(1)));
        assert_eq!((waits.await.unwrap().as_str(), queue.length(Kind::Pool)), ("a", 0));
    }
}
