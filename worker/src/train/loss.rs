//! The loss service: in the pool, here on a fetched LM head, or over labels. The loop does not know which.

use carryon_crds::pool::Dtype;
use carryon_crds::wire::ModelDescription;
use tokio::runtime::Handle;

use crate::exchange::{LossRequest, PoolClient};
use crate::head::loss::{LossWeights, lm_loss};
use crate::kernel::cpu::{Cpu, Panels};
use crate::kernel::{Backend as _, DeviceError};
use crate::numbers::{from_bytes, into_bytes, number_bytes};
use crate::train::error::TrainError;
use crate::train::pool::pool_error;
use crate::train::states::MicroBatch;
use crate::train::stop::Stop;

/// Measures predictions.
pub trait Loss {
    /// Loss of every target of `batch`, given what the head put out for it (row-major): `g ⊙ Δ` of its rows, or logits of its samples. Without an
    /// output: the base's own. None when someone asked to stop.
    ///
    /// The output is as large as its gradient: whoever takes it need not keep both.
    ///
    /// # Errors
    /// The pool did not answer, or refused.
    fn measure(&mut self, batch: &MicroBatch, output: Option<Vec<f32>>, gradient: bool) -> Result<Option<Measured>, TrainError>;
}

/// Losses of some targets.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Measured {
    /// Nats of each target.
    pub loss: Vec<f32>,
    /// Derivative of their sum by the output, row-major; empty when it was not asked for.
    pub gradient: Vec<f32>,
}

/// The remote loss: the LM head stays in the pool.
pub struct RemoteLoss {
    /// Bound to the base.
    pub client: PoolClient,
    /// Scale of the head's output.
    pub alpha: f64,
    /// Bytes of one request.
    pub max_body_bytes: u64,
    /// Rows of one request.
    pub max_rows: usize,
    /// Where requests run.
    pub runtime: Handle,
    /// Ends every wait.
    pub stop: Stop,
}

impl Loss for RemoteLoss {
    fn measure(&mut self, batch: &MicroBatch, output: Option<Vec<f32>>, gradient: bool) -> Result<Option<Measured>, TrainError> {
        let (width, alpha) = (batch.hidden_size, self.alpha as f32);
        let row_bytes = width * number_bytes(batch.dtype);
        // Header and tensor names take less than the page set aside for them.
        let by_bytes = self.max_body_bytes.saturating_sub(4096) as usize / (row_bytes + 4 * width + 4);
        let rows = by_bytes.min(self.max_rows).max(1);
        let mut measured = Measured::default();
        let delta = output.map(|mut output| {
            output.iter_mut().for_each(|delta| *delta *= alpha);
            into_bytes(output)
        });
        for (index, targets) in batch.targets.chunks(rows).enumerate() {
            let first = index * rows;
            let range = first..first + targets.len();
            let request = LossRequest {
                hidden_size: width,
                dtype: batch.dtype,
                x: batch.x(range.clone()),
                delta: delta.as_ref().map(|delta| delta.slice(4 * width * range.start..4 * width * range.end)),
                targets: targets.to_vec(),
                gradient,
            };
            let Some(response) = self.runtime.block_on(self.stop.race(self.client.loss(&request))) else { return Ok(None) };
            let response = response.map_err(pool_error)?;
            measured.loss.extend(response.loss);
            match response.gradient {
                Some(gradient) if index == 0 => measured.gradient = gradient,
                gradient => measured.gradient.extend(gradient.into_iter().flatten()),
            }
        }
        measured.gradient.iter_mut().for_each(|gradient| *gradient *= alpha);
        Ok(Some(measured))
    }
}

/// The local loss: the LM head, fetched once, packed in both directions.
pub struct LocalLoss {
    cpu: Cpu,
    forward: Panels,
    backward: Panels,
    dtype: Dtype,
    alpha: f64,
}

impl LocalLoss {
    /// Packs `weight`, V × D numbers in the pool's number type, little-endian.
    ///
    /// # Errors
    /// The device failed.
    pub fn new(description: &ModelDescription, weight: &[u8], alpha: f64, cpu: Cpu) -> Result<Self, TrainError> {
        let (vocabulary, width) = (description.vocab_size as usize, description.hidden_size as usize);
        let dtype = description.numerics.dtype;
        let row_bytes = width * number_bytes(dtype);
        let row = |row: usize, values: &mut [f32]| from_bytes(&weight[row * row_bytes..][..row_bytes], dtype, values);
        let forward = cpu.matrix(vocabulary, width, dtype.into(), &row).map_err(device_error)?;
        let backward = cpu.transposed(&forward).map_err(device_error)?;
        Ok(Self { cpu, forward, backward, dtype, alpha })
    }
}

impl Loss for LocalLoss {
    fn measure(&mut self, batch: &MicroBatch, output: Option<Vec<f32>>, gradient: bool) -> Result<Option<Measured>, TrainError> {
        let mut x = vec![0.0; batch.targets.len() * batch.hidden_size];
        from_bytes(&batch.x(0..batch.targets.len()), batch.dtype, &mut x);
        let alpha = self.alpha as f32;
        let weights =
            LossWeights { forward: &self.forward, backward: gradient.then_some(&self.backward), dtype: self.dtype, softcap: None };
        let output = output.as_deref().map(|output| (output, alpha));
        let mut measured = lm_loss(&self.cpu, &weights, &x, output, &batch.targets).map_err(device_error)?;
        measured.gradient.iter_mut().for_each(|gradient| *gradient *= alpha);
        Ok(Some(Measured { loss: measured.loss, gradient: measured.gradient }))
    }
}

fn device_error(error: DeviceError) -> TrainError {
    TrainError::Head(error.to_string())
}

/// Cross entropy of labels. The base has no loss of its own here: without an output every label is as likely as any other.
pub struct LabelLoss {
    /// Number of labels.
    pub labels: usize,
}

impl Loss for LabelLoss {
    fn measure(&mut self, batch: &MicroBatch, output: Option<Vec<f32>>, gradient: bool) -> Result<Option<Measured>, TrainError> {
        let Some(logits) = output else {
            return Ok(Some(Measured { loss: vec![(self.labels as f32).ln(); batch.targets.len()], gradient: Vec::new() }));
        };
        let mut measured = Measured::default();
        for (row, &target) in logits.chunks_exact(self.labels).zip(&batch.targets) {
            let highest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let exponentials: Vec<f64> = row.iter().map(|logit| f64::from(logit - highest).exp()).collect();
            let sum: f64 = exponentials.iter().sum();
            measured.loss.push((sum.ln() - f64::from(row[target as usize] - highest)) as f32);
            if gradient {
                let hit = |label: usize| f64::from(u8::from(label == target as usize));
                measured.gradient.extend(exponentials.iter().enumerate().map(|(label, value)| (value / sum - hit(label)) as f32));
            }
        }
        Ok(Some(measured))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::head::pass::PackedBatch;

    fn batch(targets: Vec<u32>) -> MicroBatch {
        let packed = PackedBatch { taps: Vec::new(), formats: Vec::new(), lengths: Vec::new(), rows: Vec::new() };
        MicroBatch { packed, x: Vec::new(), dtype: Dtype::Float32, hidden_size: 1, targets, tokens: 0 }
    }

    /// `torch.nn.functional.cross_entropy(torch.tensor([[1., 2., 3.], [0.5, -1., 0.]]), torch.tensor([2, 0]), reduction="none")` and its gradient.
    #[test]
    fn label_loss_follows_pytorch() {
        let measured =
            LabelLoss { labels: 3 }.measure(&batch(vec![2, 0]), Some(vec![1.0, 2.0, 3.0, 0.5, -1.0, 0.0]), true).unwrap().unwrap();
        let close = |found: &[f32], expected: &[f32]| found.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-6);
        assert!(close(&measured.loss, &[0.407_606, 0.604_131_34]), "{:?}", measured.loss);
        assert!(
            close(&measured.gradient, &[0.090_030_57, 0.244_728_47, -0.334_759_04, -0.453_451_5, 0.121_951_65, 0.331_498_98]),
            "{:?}",
            measured.gradient
        );
    }

    #[test]
    fn infinite_logits_give_a_loss_that_is_no_number() {
        let measured = LabelLoss { labels: 2 }.measure(&batch(vec![0]), Some(vec![f32::NAN, 0.0]), false).unwrap().unwrap();
        assert!(measured.loss[0].is_nan());
    }
}
