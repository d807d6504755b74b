//! What the device thread computes with.

use std::sync::Arc;

use super::memory::Memory;
use crate::base::metrics::Metrics;
use crate::base::registry::Registry;
use crate::kernel::{Arena, Backend, Threads};
use crate::model::Model;

/// The model, its memory, and whom it tells.
pub struct Engine<B: Backend> {
    /// The base.
    pub model: Arc<Model<B>>,
    /// Pages of what is served.
    pub memory: Memory<B>,
    /// Pages of one layer, for the sequences of a trainer.
    pub single_pass: Option<Arena<B>>,
    /// Threads for work on the host.
    pub host: Arc<Threads>,
    /// Heads that are known.
    pub registry: Arc<Registry>,
    /// Metrics.
    pub metrics: Arc<Metrics>,
}
