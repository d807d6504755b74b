//! Which pods compute in the way that a client is bound to.

use std::collections::HashMap;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use carryon_crds::wire::Numerics;

use super::endpoints::lock;
use super::{ClientError, Endpoint};

/// How long a pod is known to compute in another way: its address may become another pod's.
const REMEMBERED: Duration = Duration::from_secs(300);

/// The numerics a client is bound to, and the pods that have others.
#[derive(Debug)]
pub(super) struct Wanted {
    key: String,
    others: Mutex<HashMap<Endpoint, Instant>>,
}

impl Wanted {
    pub fn new(numerics: &Numerics) -> Self {
        Self { key: numerics.key(), others: Mutex::default() }
    }

    /// Whether a pod is not known to have others.
    pub fn may_agree(&self, endpoint: &Endpoint) -> bool {
        lock(&self.others).get(endpoint).is_none_or(|since| since.elapsed() >= REMEMBERED)
    }

    /// Takes note of a pod's numerics: whether they are the wanted ones.
    pub fn note(&self, endpoint: &Endpoint, found: &str) -> bool {
        let agrees = self.key == found;
        match agrees {
            true => lock(&self.others).remove(endpoint),
            false => lock(&self.others).insert(endpoint.clone(), Instant::now()),
        };
        agrees
    }

    /// What is said of a pod that has others.
    pub fn changed(&self, endpoint: &Endpoint, found: &str) -> ClientError {
        ClientError::NumericsChanged { endpoint: endpoint.clone(), expected: self.key.clone(), found: found.to_owned() }
    }
}
