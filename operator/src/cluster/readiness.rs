//! Whether this operator can do its work, and what it has done.

use std::sync::{Arc, Mutex};

use tokio::sync::watch;

use super::lock::lock;
use super::metrics::Counters;
use super::queue::Queue;
use super::store::Stores;
use super::synced::Synced;
use super::tenure::{Tenure, Tenures};

/// What the operator works with while it leads.
#[derive(Clone)]
pub struct Work {
    /// What the cluster holds.
    pub stores: Arc<Stores>,
    /// Whether the stores can be relied on.
    pub synced: Arc<Synced>,
    /// Who has to be reconciled.
    pub queue: Arc<Queue>,
}

/// What others may ask this operator about itself.
pub struct Readiness {
    /// What it has done.
    pub counters: Counters,
    installation: String,
    tenures: watch::Receiver<Tenures>,
    work: Mutex<Option<Work>>,
}

impl Readiness {
    /// At the start.
    pub fn new(installation: String, tenures: watch::Receiver<Tenures>) -> prometheus::Result<Self> {
        Ok(Self { counters: Counters::new()?, installation, tenures, work: Mutex::default() })
    }

    /// What it works with from now on; nothing while it waits for its turn.
    pub fn set_work(&self, work: Option<Work>) {
        *lock(&self.work) = work;
    }

    /// What it works with now.
    pub fn work(&self) -> Option<Work> {
        lock(&self.work).clone()
    }

    /// `Ok` when it does its work, or waits for another of its installation to end; what is in the way, in a line each, when not.
    pub fn ready(&self) -> Result<String, String> {
        let tenures = self.tenures.borrow().clone();
        if !tenures.leads() {
            return self.stands_by(&tenures);
        }
        let mut missing = self.work().map_or_else(|| vec!["starting".to_owned()], |work| work.synced.missing());
        let (good, bad): (Vec<_>, Vec<_>) = tenures.elsewhere().into_iter().partition(|(good, _)| *good);
        missing.extend(bad.into_iter().map(|(_, line)| line));
        let left = good.into_iter().map(|(_, line)| line);
        if missing.is_empty() {
            Ok(["ok".to_owned()].into_iter().chain(left).collect::<Vec<_>>().join("\n"))
        } else {
            Err(missing.join("\n"))
        }
    }

    /// The same of one that works nowhere.
    fn stands_by(&self, tenures: &Tenures) -> Result<String, String> {
        let holders = || tenures.0.values().filter_map(|tenure| tenure.holder.as_ref());
        if let Some((holder, _)) = holders().find(|(_, installation)| *installation == self.installation) {
            return Ok(format!("ok\nwaiting while {holder} works"));
        }
        if let Some((holder, other)) = holders().next() {
            return Err(format!("refused: {holder} of installation {other:?} works in the same namespaces: remove one of the two"));
        }
        let unknown: Vec<String> = tenures.0.values().filter_map(|tenure: &Tenure| tenure.unknown.clone()).collect();
        if unknown.is_empty() { Ok("ok\nwaiting for the election".to_owned()) } else { Err(unknown.join("\n")) }
    }
}
