//! The LM head, packed for both directions.

use carryon_crds::pool::Dtype;

use crate::kernel::{Backend, Left, Part, Result, Sink};

/// The frozen weight W (V × D) that turns final states into logits.
pub struct LmHead<B: Backend> {
    forward: B::Matrix,
    backward: B::Matrix,
    dtype: Dtype,
    softcap: Option<f32>,
}

impl<B: Backend> LmHead<B> {
    pub(super) fn new(backend: &B, forward: B::Matrix, dtype: Dtype, softcap: Option<f32>) -> Result<Self> {
        let backward = backend.transposed(&forward)?;
        Ok(Self { forward, backward, dtype, softcap })
    }

    /// W: the product with it is `states · Wᵀ`.
    pub fn forward(&self) -> &B::Matrix {
        &self.forward
    }

    /// Wᵀ: the product with it is `dlogits · W`.
    pub fn backward(&self) -> &B::Matrix {
        &self.backward
    }

    /// Number type of W.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Bound c of the logits, which are `c · tanh(W y / c)`.
    pub fn softcap(&self) -> Option<f32> {
        self.softcap
    }

    /// Size V of the vocabulary.
    pub fn vocab_size(&self) -> usize {
        B::shape(&self.forward).0
    }

    /// Logits (rows × V) of final states (rows × D).
    ///
    /// # Errors
    /// The device failed.
    pub fn logits(&self, backend: &B, states: &B::Rows) -> Result<B::Rows> {
        let mut logits = B::Rows::default();
        let part = Part { rows: B::count(states), matrix: &self.forward, norm: None };
        backend.product(Left::Plain(states), &[part], Sink::Store(&mut logits))?;
        if let Some(cap) = self.softcap {
            backend.softcap(&mut logits, cap)?;
        }
        Ok(logits)
    }
}
