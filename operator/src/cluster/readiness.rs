//! Whether this operator can do its work, and what it has done.

use std::sync::{Arc, Mutex};

use tokio::sync::watch;

use super::leader::Tenure;
use super::lock::lock;
use super::metrics::Counters;
use super::queue::Queue;
use super::store::Stores;
use super::synced::Synced;

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
    tenure: watch::Receiver<Tenure>,
    work: Mutex<Option<Work>>,
}

impl Readiness {
    /// At the start.
    pub fn new(installation: String, tenure: watch::Receiver<Tenure>) -> prometheus::Result<Self> {
        Ok(Self { counters: Counters::new()?, installation, tenure, work: Mutex::default() })
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
        let tenure = self.tenure.borrow().clone();
        if tenure.leads {
            let missing = self.work().map_or_else(|| vec!["starting".to_owned()], |work| work.synced.missing());
            let left = tenure.left.iter().map(|(namespace, holder)| format!("\nnamespace {namespace} is left to {holder}"));
            return if missing.is_empty() { Ok("ok".to_owned() + &left.collect::<String>()) } else { Err(missing.join("\n")) };
        }
        match (tenure.holder, tenure.unknown) {
            (Some((holder, other)), _) if other != self.installation => {
                Err(format!("refused: {holder} of installation {other:?} works in the same namespaces: remove one of the two"))
            }
            (Some((holder, _)), _) => Ok(format!("ok\nwaiting while {holder} works")),
            (None, Some(words)) => Err(words),
            (None, None) => Ok("ok\nwaiting for the election".to_owned()),
        }
    }
}
