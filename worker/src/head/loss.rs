//! The loss at the frozen LM head: behind the pool's remote loss and the trainer's local one.

use carryon_crds::pool::Dtype;
use carryon_crds::wire::memory::LOGIT_ROWS;

use crate::kernel::{Backend, Result};

/// Rows whose logits exist at the same time: bounds memory at `TILE · V` floats.
pub const TILE: usize = LOGIT_ROWS;

/// Loss and gradient of each row.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LossOutput {
    /// `logsumexp(W y) - (W y)[target]` per row, in nats.
    pub loss: Vec<f32>,
    /// Its derivative by `y`, `[rows, D]`, not divided by anything; empty when not asked for.
    pub gradient: Vec<f32>,
}

/// The LM head W (V × D) and, for gradients, its transpose.
pub struct LossWeights<'a, B: Backend> {
    /// W.
    pub forward: &'a B::Matrix,
    /// Wᵀ; without it there are no gradients.
    pub backward: Option<&'a B::Matrix>,
    /// The pool's number type.
    pub dtype: Dtype,
    /// Bound of the logits, see [`Backend::losses`].
    pub softcap: Option<f32>,
}

/// Loss of `y = x̂ + α · output` against `targets`, all below V. `x` is `[rows, D]`, rounded to the pool's number type; `output`, if any, is what a head
/// put out for these rows, and α. With α = 0 it is not read. A row's result does not depend on the other rows.
///
/// # Errors
/// The device failed.
pub fn lm_loss<B: Backend>(
    backend: &B,
    weights: &LossWeights<'_, B>,
    x: &[f32],
    output: Option<(&[f32], f32)>,
    targets: &[u32],
) -> Result<LossOutput> {
    let width = B::shape(weights.forward).1;
    assert_eq!(x.len(), targets.len() * width, "a target per row");
    let mut whole = LossOutput::default();
    for (index, targets) in targets.chunks(TILE).enumerate() {
        let (rows, first) = (targets.len(), index * TILE * width);
        let mut y = backend.write(&x[first..][..rows * width], width)?;
        if let Some((output, alpha)) = output.filter(|(_, alpha)| *alpha != 0.0) {
            let at: Vec<u32> = (0..rows as u32).collect();
            let delta = backend.write(&output[first..][..rows * width], width)?;
            backend.combine(&mut y, &at, &vec![alpha; rows], &delta, weights.dtype)?;
        }
        let (loss, gradient) = backend.losses(&y, weights.forward, weights.backward, targets, weights.softcap)?;
        whole.loss.extend(loss);
        if let Some(gradient) = gradient {
            whole.gradient.extend_from_slice(&backend.read(&gradient)?);
        }
    }
    Ok(whole)
}
