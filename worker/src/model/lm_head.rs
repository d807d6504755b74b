//! The LM head, packed for both directions.

use std::sync::{Arc, OnceLock};

use crate::kernel::{Panels, Threads, matmul};

/// The frozen weight W (V × D) that turns final states into logits.
pub struct LmHead {
    forward: Panels,
    backward: OnceLock<Panels>,
    threads: Arc<Threads>,
}

impl LmHead {
    pub(super) fn new(forward: Panels, threads: Arc<Threads>) -> Self {
        Self { forward, backward: OnceLock::new(), threads }
    }

    /// Panels of W: the product with them is `states · Wᵀ`.
    pub fn forward(&self) -> &Panels {
        &self.forward
    }

    /// Panels of Wᵀ: the product with them is `dlogits · W`. Packed on first use.
    pub fn backward(&self) -> &Panels {
        self.backward.get_or_init(|| self.forward.transposed(&self.threads))
    }

    /// Size V of the vocabulary.
    pub fn vocab_size(&self) -> usize {
        self.forward.rows()
    }

    /// Row `token` of W, in the pool's dtype.
    pub fn row(&self, token: usize, values: &mut [f32]) {
        self.forward.row(token, values);
    }

    /// Logits (rows × V) of final states (rows × D).
    pub fn logits(&self, states: &[f32]) -> Vec<f32> {
        let mut logits = vec![0.0; states.len() / self.forward.cols() * self.forward.rows()];
        matmul(&self.threads, states, &self.forward, &mut logits);
        logits
    }
}
