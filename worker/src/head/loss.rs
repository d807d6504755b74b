//! The loss at the frozen LM head: behind the pool's remote loss and the trainer's local one.

use carryon_crds::pool::Dtype;
use carryon_crds::wire::memory::LOGIT_ROWS;

use crate::kernel::{Aim, Backend, Result};

/// Rows whose logits exist at the same time: bounds memory at `TILE · V` floats.
pub const TILE: usize = LOGIT_ROWS;

/// Loss and gradient of each row.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LossOutput {
    /// Per row, in nats, see [`Backend::losses`].
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

/// What rows are measured against.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Against<'a> {
    /// A token each, below V.
    Tokens(&'a [u32]),
    /// The base: how far they are from what it says.
    Base,
}

/// Loss of `y = x̂ + α · output`. `x` is `[rows, D]`, rounded to the pool's number type; `output`, if any, is what a head
/// put out for these rows, and α. With α = 0 it is not read. A row's result does not depend on the other rows.
///
/// # Errors
/// The device failed.
pub fn lm_loss<B: Backend>(
    backend: &B,
    weights: &LossWeights<'_, B>,
    x: &[f32],
    output: Option<(&[f32], f32)>,
    against: Against<'_>,
) -> Result<LossOutput> {
    let width = B::shape(weights.forward).1;
    let mut whole = LossOutput::default();
    for (index, x) in x.chunks(TILE * width).enumerate() {
        let (rows, first) = (x.len() / width, index * TILE);
        let mut y = backend.write(x, width)?;
        if let Some((output, alpha)) = output.filter(|(_, alpha)| *alpha != 0.0) {
            let at: Vec<u32> = (0..rows as u32).collect();
            let delta = backend.write(&output[first * width..][..rows * width], width)?;
            backend.combine(&mut y, &at, &vec![alpha; rows], &delta, weights.dtype)?;
        }
        let base;
        let aim = match against {
            Against::Tokens(targets) => Aim::Tokens(&targets[first..][..rows]),
            Against::Base => {
                base = backend.write(x, width)?;
                Aim::Rows(&base)
            }
        };
        let (loss, gradient) = backend.losses(&y, weights.forward, weights.backward, aim, weights.softcap)?;
        whole.loss.extend(loss);
        if let Some(gradient) = gradient {
            whole.gradient.extend_from_slice(&backend.read(&gradient)?);
        }
    }
    Ok(whole)
}
