//! Token losses measured here.

use carryon_crds::pool::Dtype;
use carryon_crds::wire::ModelDescription;

use super::{Loss, Measured};
use crate::head::loss::{LossWeights, lm_loss};
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
}

impl<B: Backend> LocalLoss<B> {
    /// Packs `weight`, V × D numbers in the pool's number type, little-endian.
    ///
    /// # Errors
    /// The device failed.
    pub fn new(description: &ModelDescription, weight: &[u8], alpha: f64, backend: B) -> Result<Self, TrainError> {
        let (vocabulary, width) = (description.vocab_size as usize, description.hidden_size as usize);
        let dtype = description.numerics.dtype;
        let row_bytes = width * number_bytes(dtype);
        let row = |row: usize, values: &mut [f32]| from_bytes(&weight[row * row_bytes..][..row_bytes], dtype, values);
        let forward = backend.matrix(vocabulary, width, dtype.into(), &row).map_err(device_error)?;
        let backward = backend.transposed(&forward).map_err(device_error)?;
        Ok(Self { backend, forward, backward, dtype, alpha })
    }
}

impl<B: Backend> Loss for LocalLoss<B> {
    fn measure(&mut self, batch: &MicroBatch, output: Option<Vec<f32>>, gradient: bool) -> Result<Option<Measured>, TrainError> {
        let targets = batch.targets.indices();
        let mut x = vec![0.0; targets.len() * batch.hidden_size];
        from_bytes(&batch.x(0..targets.len()), batch.dtype, &mut x);
        let alpha = self.alpha as f32;
        let weights =
            LossWeights { forward: &self.forward, backward: gradient.then_some(&self.backward), dtype: self.dtype, softcap: None };
        let output = output.as_deref().map(|output| (output, alpha));
        let mut measured = lm_loss(&self.backend, &weights, &x, output, targets).map_err(device_error)?;
        measured.gradient.iter_mut().for_each(|gradient| *gradient *= alpha);
        Ok(Some(Measured { loss: measured.loss, gradient: measured.gradient }))
    }
}
