//! What the device thread computes with.

use std::sync::Arc;

use super::EngineLimits;
use super::memory::Memory;
use crate::base::load::MAX_SEQUENCES;
use crate::base::metrics::Metrics;
use crate::base::registry::Registry;
use crate::kernel::{Arena, Backend, Result, Threads, pages_for};
use crate::model::Model;

/// The model, its memory, and whom it tells.
pub struct Engine<B: Backend> {
    /// The base.
    pub model: Arc<Model<B>>,
    /// Pages of what is served.
    pub memory: Memory<B>,
    /// Pages of one layer, for the sequences of a trainer; none while a capture has them.
    pub single_pass: Option<Arena<B>>,
    /// Threads for work on the host.
    pub host: Arc<Threads>,
    /// Heads that are known.
    pub registry: Arc<Registry>,
    /// Metrics.
    pub metrics: Arc<Metrics>,
}

impl<B: Backend> Engine<B> {
    /// Memory within these limits, all of it free.
    ///
    /// # Errors
    /// The device has less.
    pub fn new(
        model: Arc<Model<B>>,
        host: Arc<Threads>,
        limits: &EngineLimits,
        registry: Arc<Registry>,
        metrics: Arc<Metrics>,
    ) -> Result<Self> {
        let memory = Memory::new(&model, limits.kv_cache_bytes)?;
        // A page for each sequence may be partly empty.
        let pages = pages_for(limits.max_num_batched_tokens.max(limits.max_model_len)) + MAX_SEQUENCES;
        let single_pass = Some(Arena::new(&model.backend, model.single_pass_layout(), pages)?);
        Ok(Self { model, memory, single_pass, host, registry, metrics })
    }
}
