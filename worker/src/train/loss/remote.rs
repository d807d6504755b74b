//! Token losses that the pool measures.

use tokio::runtime::Handle;

use super::{Loss, Measured};
use crate::exchange::{LossRequest, PoolClient};
use crate::numbers::{into_bytes, number_bytes};
use crate::train::error::TrainError;
use crate::train::pool::pool_error;
use crate::train::states::MicroBatch;
use crate::train::stop::Stop;

/// The remote loss: the LM head stays in the pool.
pub struct RemoteLoss {
    /// Bound to the base.
    pub client: PoolClient,
    /// Scale of the head's output.
    pub alpha: f64,
    /// How much the divergence on what is replayed counts.
    pub kl_coef: f64,
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
        // The base alone does not diverge from itself.
        for (range, targets) in batch.parts(rows).filter(|(_, targets)| targets.is_some() || delta.is_some()) {
            let request = LossRequest {
                hidden_size: width,
                dtype: batch.dtype,
                x: batch.x(range.clone()),
                delta: delta.as_ref().map(|delta| delta.slice(4 * width * range.start..4 * width * range.end)),
                targets: targets.map(<[u32]>::to_vec),
                gradient,
            };
            let Some(response) = self.runtime.block_on(self.stop.race(self.client.loss(&request))) else { return Ok(None) };
            let response = response.map_err(pool_error)?;
            if targets.is_some() { &mut measured.loss } else { &mut measured.divergence }.extend(response.loss);
            match response.gradient {
                Some(gradient) if range.start == 0 => measured.gradient = gradient,
                gradient => measured.gradient.extend(gradient.into_iter().flatten()),
            }
        }
        measured.gradient.iter_mut().for_each(|gradient| *gradient *= alpha);
        measured.weigh_replay(batch, self.kl_coef);
        Ok(Some(measured))
    }

    fn set_alpha(&mut self, alpha: f64) {
        self.alpha = alpha;
    }
}
