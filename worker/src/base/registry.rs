//! Heads that gateways have pushed, by digest.

use std::any::Any;
use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use carryon_crds::wire::{HeadShape, Identity};

use crate::exchange::wire::{ErrorCode, HeadStatus, WireError};
use crate::head::{Artifact, Runner, RunnerError};
use crate::kernel::Backend;
use crate::model::Tap;

/// Longest time a head is kept unused.
pub const MAX_EXPIRY: Duration = Duration::from_secs(7 * 24 * 3600);
/// Time a head is kept unused when the request does not say.
pub const DEFAULT_EXPIRY: Duration = Duration::from_secs(3600);

/// A head ready to run.
pub struct LoadedHead {
    /// Digest of its file.
    pub digest: String,
    /// Its shape.
    pub shape: HeadShape,
    /// Where it reads.
    pub taps: BTreeSet<Tap>,
    /// Bytes of its packed weights.
    pub bytes: u64,
    /// The [`Runner`] of the pool's device, which the device thread alone needs to know.
    runner: Box<dyn Any + Send + Sync>,
}

impl LoadedHead {
    /// A head named by its digest.
    pub fn new<B: Backend>(digest: &str, runner: Runner<B>) -> Self {
        let (shape, bytes) = (runner.shape().clone(), runner.bytes() as u64);
        let taps = Tap::all(&shape.taps).collect();
        Self { digest: digest.to_owned(), shape, taps, bytes, runner: Box::new(runner) }
    }

    /// The head on the pool's device.
    ///
    /// # Panics
    /// On another device than the one it was packed for.
    pub fn runner<B: Backend>(&self) -> &Runner<B> {
        self.runner.downcast_ref().expect("a pool has one device")
    }
}

/// Packs a head for the pool's device.
pub type Pack = Box<dyn Fn(&Artifact) -> Result<LoadedHead, RunnerError> + Send + Sync>;

/// What a head must fit.
pub struct Fit {
    /// The base.
    pub identity: Identity,
    /// Its width D.
    pub hidden_size: u32,
    /// Its layers.
    pub layers: u32,
    /// How it is packed.
    pub pack: Pack,
}

impl Fit {
    /// Reads, verifies and packs the bytes of a head named `digest`.
    pub fn load(&self, digest: &str, bytes: Bytes) -> Result<LoadedHead, WireError> {
        let invalid = |reason: String| WireError::new(ErrorCode::HeadInvalid, reason);
        let artifact = Artifact::parse(digest, &bytes).map_err(|error| invalid(error.to_string()))?;
        // There may be no memory for them beside the packed weights.
        drop(bytes);
        artifact.verify("head", digest).map_err(|error| invalid(error.to_string()))?;
        if let Some(member) = artifact.base.identity.difference(&self.identity) {
            let message = format!("head {digest} was trained on base {:?}: its {member} is not this pool's", artifact.base.name);
            return Err(WireError::new(ErrorCode::IdentityMismatch, message));
        }
        if artifact.shape.hidden_size != self.hidden_size {
            return Err(invalid(format!("hidden_size is {}, the base's is {}", artifact.shape.hidden_size, self.hidden_size)));
        }
        if let Some(layer) = artifact.shape.taps.layers.iter().find(|layer| **layer > self.layers) {
            return Err(invalid(format!("taps.layers holds {layer}, the base has {} layers", self.layers)));
        }
        (self.pack)(&artifact).map_err(|error| invalid(error.to_string()))
    }
}

struct Entry {
    head: Arc<LoadedHead>,
    bytes: u64,
    expiry: Duration,
    used: Instant,
}

impl Entry {
    fn left(&self, now: Instant) -> Duration {
        (self.used + self.expiry).saturating_duration_since(now)
    }
}

/// The heads a pool holds: bounded in bytes, dropped when they expire or when room is needed, the longest unused first.
pub struct Registry {
    bound: u64,
    entries: Mutex<HashMap<String, Entry>>,
}

impl Registry {
    /// An empty registry for `bound` bytes of packed weights.
    pub fn new(bound: u64) -> Self {
        Self { bound, entries: Mutex::default() }
    }

    /// Keeps a head, or renews it when it is held already.
    pub fn put(&self, head: LoadedHead, expiry: Duration, now: Instant) -> Result<HeadStatus, WireError> {
        let bytes = head.bytes;
        if bytes > self.bound {
            let message = format!("head {} takes {bytes} bytes, this pool keeps {} for all", head.digest, self.bound);
            return Err(WireError::new(ErrorCode::TooLarge, message));
        }
        let mut entries = self.entries(now);
        let digest = head.digest.clone();
        entries.remove(&digest);
        while entries.values().map(|entry| entry.bytes).sum::<u64>() + bytes > self.bound {
            let Some(oldest) = entries.values().min_by_key(|entry| entry.used).map(|entry| entry.head.digest.clone()) else { break };
            tracing::info!("dropped head {oldest}: room is needed for {digest}");
            entries.remove(&oldest);
        }
        let entry = Entry { head: Arc::new(head), bytes, expiry: expiry.min(MAX_EXPIRY), used: now };
        let status = status(&digest, &entry, now);
        entries.insert(digest, entry);
        Ok(status)
    }

    /// A head, for a request: counts as use.
    pub fn get(&self, digest: &str, now: Instant) -> Result<Arc<LoadedHead>, WireError> {
        let mut entries = self.entries(now);
        let entry = entries.get_mut(digest).ok_or_else(|| missing(digest))?;
        entry.used = now;
        Ok(entry.head.clone())
    }

    /// Renews a head that is held; `expiry` replaces its own when given.
    pub fn renew(&self, digest: &str, expiry: Option<Duration>, now: Instant) -> Result<HeadStatus, WireError> {
        let mut entries = self.entries(now);
        let entry = entries.get_mut(digest).ok_or_else(|| missing(digest))?;
        (entry.used, entry.expiry) = (now, expiry.unwrap_or(entry.expiry).min(MAX_EXPIRY));
        Ok(status(digest, entry, now))
    }

    /// Drops a head; answers that use it go on.
    pub fn delete(&self, digest: &str, now: Instant) -> Result<(), WireError> {
        self.entries(now).remove(digest).map(drop).ok_or_else(|| missing(digest))
    }

    /// Where the heads held read that may go on from what others have computed: those that read this base alone.
    pub fn taps(&self, now: Instant) -> BTreeSet<Tap> {
        self.entries(now)
            .values()
            .filter(|entry| entry.head.shape.others.is_empty())
            .flat_map(|entry| entry.head.taps.iter().copied())
            .collect()
    }

    /// Heads held and their bytes.
    pub fn usage(&self, now: Instant) -> (usize, u64) {
        let entries = self.entries(now);
        (entries.len(), entries.values().map(|entry| entry.bytes).sum())
    }

    fn entries(&self, now: Instant) -> MutexGuard<'_, HashMap<String, Entry>> {
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        entries.retain(|_, entry| !entry.left(now).is_zero());
        entries
    }
}

fn status(digest: &str, entry: &Entry, now: Instant) -> HeadStatus {
    HeadStatus { digest: digest.to_owned(), bytes: entry.bytes, expires_in_seconds: entry.left(now).as_secs() }
}

fn missing(digest: &str) -> WireError {
    WireError::new(ErrorCode::HeadMissing, format!("this pool does not hold head {digest}"))
}

/// Refuses a head that puts out something for each token where numbers for a whole text are asked for (`pooled`), and the other way round.
pub fn expect_task(head: &LoadedHead, pooled: bool) -> Result<(), WireError> {
    if head.shape.task.is_pooled() == pooled {
        return Ok(());
    }
    let needed = if pooled { "another task than CausalLM" } else { "CausalLM" };
    let message = format!("head {} was trained for {:?}, this route needs {needed}", head.digest, head.shape.task);
    Err(WireError::new(ErrorCode::InvalidRequest, message))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::{Cpu, Threads};
    use carryon_crds::common::Taps;
    use carryon_crds::job::{HeadSpec, Task};

    fn head(digest: &str) -> LoadedHead {
        let head = HeadSpec { width: 16, blocks: 1, attention_heads: 2, ..HeadSpec::default() };
        let shape = head.shape(Task::CausalLM, Taps { layers: vec![], final_norm: true }, 16, 64);
        let weights = crate::head::init::weights(&shape, 1);
        LoadedHead::new(digest, Runner::from_weights(&shape, &weights, Cpu::new(Threads::new(1))).unwrap())
    }

    const HOUR: Duration = Duration::from_secs(3600);

    #[test]
    fn heads_expire_unless_used_or_renewed() {
        let (registry, start) = (Registry::new(u64::MAX), Instant::now());
        registry.put(head("a"), HOUR, start).unwrap();
        registry.put(head("b"), HOUR, start).unwrap();
        registry.put(head("c"), HOUR, start).unwrap();
        registry.get("a", start + HOUR / 2).unwrap();
        assert_eq!(registry.renew("b", Some(HOUR * 2), start + HOUR / 2).unwrap().expires_in_seconds, 7200);
        let later = start + HOUR + HOUR / 4;
        assert!(registry.get("a", later).is_ok());
        assert!(registry.get("b", later).is_ok());
        assert_eq!(registry.get("c", later).err().unwrap().code, ErrorCode::HeadMissing);
        assert_eq!(registry.usage(later).0, 2);
        assert!(registry.get("a", later + HOUR * 2).is_err());
    }

    #[test]
    fn the_longest_unused_makes_room_and_a_head_beyond_the_bound_is_refused() {
        let bytes = head("a").bytes;
        let (registry, start) = (Registry::new(2 * bytes), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        registry.put(head("a"), HOUR, at(0)).unwrap();
        registry.put(head("b"), HOUR, at(1)).unwrap();
        registry.get("a", at(2)).unwrap();
        registry.put(head("c"), HOUR, at(3)).unwrap();
        assert!(registry.get("b", at(3)).is_err());
        assert_eq!(registry.usage(at(3)), (2, 2 * bytes));
        assert_eq!(Registry::new(bytes - 1).put(head("a"), HOUR, start).unwrap_err().code, ErrorCode::TooLarge);
    }

    #[test]
    fn deleting_twice_is_head_missing() {
        let (registry, now) = (Registry::new(u64::MAX), Instant::now());
        registry.put(head("a"), HOUR, now).unwrap();
        registry.delete("a", now).unwrap();
        assert_eq!(registry.delete("a", now).unwrap_err().code, ErrorCode::HeadMissing);
    }
}
