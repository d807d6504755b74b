//! What reconciling needs beside the object.

use std::sync::Arc;

use kube::Client;

use super::apply::Applier;
use super::ask::Ask;
use super::events::Events;
use super::store::Stores;
use super::written::Written;
use crate::shared::Settings;

/// Everything an object is reconciled with.
pub struct Context {
    /// The API server.
    pub client: Client,
    /// What the cluster holds.
    pub stores: Arc<Stores>,
    /// What the operator has written that the stores may not hold yet.
    pub written: Arc<Written>,
    /// The writer of children.
    pub applier: Applier,
    /// Talks to workers.
    pub ask: Ask,
    /// Where transitions are told.
    pub events: Events,
    /// The operator's settings.
    pub settings: Settings,
}
