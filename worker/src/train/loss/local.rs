//! Token losses measured here.

use carryon_crds::pool::Dtype;
use carryon_crds::wire::ModelDescription;

use super::{Loss, Measured};
use crate::head::loss::{Against, LossWeights, lm_loss};
use crate::kernel::Backend;
use crate::numbers::{from_bytes, number_bytes};
use crate::train::error::TrainError;
use crate::train::states::MicroBatch;
use crate::train::step::device_error;

/// The local loss: the LM head, fetched once, packed in both directions.
pub struct LocalLoss<B: Backend> {
    backend: B,
    forward: B::Matrix,
    backward: B::Matrix,
    dtype: Dtype,
    alpha: f64,
    kl_coef: f64,
}

impl<B: Backend> LocalLoss<B> {
    /// The divergence on what is replayed counts `kl_coef` times. Packs `weight`, V × D numbers in the pool's number type, little-endian.
    ///
    /// # Errors
    /// The device failed.
    pub fn new(description: &ModelDescription, weight: &[u8], (alpha, kl_coef): (f64, f64), backend: B) -> Result<Self, TrainError> {
        let (vocabulary, width) = (description.vocab_size as usize, description.hidden_size as usize);
        let dtype = description.numerics.dtype;
        let row_bytes = width * number_bytes(dtype);
        let row = |row: usize, values: &mut [f32]| from_bytes(&weight[row * row_bytes..][..row_bytes], dtype, values);
        let forward = backend.matrix(vocabulary, width, dtype.into(), &row).map_err(device_error)?;
        let backward = backend.transposed(&forward).map_err(device_error)?;
        Ok(Self { backend, forward, backward, dtype, alpha, kl_coef })
    }
}

impl<B: Backend> Loss for LocalLoss<B> {
    fn measure(&mut self, batch: &MicroBatch, output: Option<Vec<f32>>, gradient: bool) -> Result<Option<Measured>, TrainError> {
        let (alpha, width) = (self.alpha as f32, batch.hidden_size);
        let weights =
            LossWeights { forward: &self.forward, backward: gradient.then_some(&self.backward), dtype: self.dtype, softcap: None };
        let mut measured = Measured::default();
        // The base alone does not diverge from itself.
        for (range, targets) in batch.parts(usize::MAX).filter(|(_, targets)| targets.is_some() || output.is_some()) {
            let mut x = vec![0.0; range.len() * width];
            from_bytes(&batch.x(range.clone()), batch.dtype, &mut x);
            let output = output.as_ref().map(|output| (&output[range.start * width..range.end * width], alpha));
            let against = targets.map_or(Against::Base, Against::Tokens);
            let found = lm_loss(&self.backend, &weights, &x, output, against).map_err(device_error)?;
            if targets.is_some() { &mut measured.loss } else { &mut measured.divergence }.extend(found.loss);
            measured.gradient.extend(found.gradient);
        }
        measured.gradient.iter_mut().for_each(|gradient| *gradient *= alpha);
        measured.weigh_replay(batch, self.kl_coef);
        Ok(Some(measured))
    }

    fn set_alpha(&mut self, alpha: f64) {
        self.alpha = alpha;
    }
}
