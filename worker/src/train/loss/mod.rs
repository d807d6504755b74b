//! The loss service: in the pool, here on a fetched LM head, or over labels and numbers. The loop does not know which. A file a kind.

mod contrast;
mod labels;
mod local;
mod pairs;
mod preferences;
mod remote;
mod sets;
mod values;
pub mod weights;

pub use contrast::ContrastLoss;
pub use labels::LabelLoss;
pub use local::LocalLoss;
pub use pairs::PairLoss;
pub use preferences::PreferenceLoss;
pub use remote::RemoteLoss;
pub use sets::SetLoss;
pub use values::{ValueLoss, unscale};

use crate::train::error::TrainError;
use crate::train::states::MicroBatch;

/// Measures predictions.
pub trait Loss {
    /// Loss of every target of `batch`, given what the head put out for it (row-major): `g ⊙ Δ` of its rows, or what it put out for its samples. Without an
    /// output: the base's own. None when someone asked to stop.
    ///
    /// The output is as large as its gradient: whoever takes it need not keep both.
    ///
    /// # Errors
    /// The pool did not answer, or refused.
    fn measure(&mut self, batch: &MicroBatch, output: Option<Vec<f32>>, gradient: bool) -> Result<Option<Measured>, TrainError>;

    /// Has the head's output count `alpha` times from now on, where it is added to the base's.
    fn set_alpha(&mut self, _alpha: f64) {}
}

/// Losses of some targets.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Measured {
    /// Of each target: nats, or squared errors.
    pub loss: Vec<f32>,
    /// Derivative of their sum by the output, row-major; empty when it was not asked for.
    pub gradient: Vec<f32>,
    /// Divergence from the base on each row that is replayed, nats; its gradient is the last of `gradient`, weighed.
    pub divergence: Vec<f32>,
    /// Where answers are compared by what the head makes of their tokens: how much it gives to each, the more the likelier.
    pub rewards: Vec<f32>,
}

impl Measured {
    /// Weighs the gradient of what is replayed in `batch`, so that the mean of its divergence counts `factor` times as much as the mean of the losses.
    fn weigh_replay(&mut self, batch: &MicroBatch, factor: f64) {
        let own = self.gradient.len() - (batch.replayed * batch.hidden_size).min(self.gradient.len());
        let weight = (factor * batch.targets.len() as f64 / batch.replayed.max(1) as f64) as f32;
        self.gradient[own..].iter_mut().for_each(|gradient| *gradient *= weight);
    }
}

#[cfg(test)]
mod tests {
    use carryon_crds::pool::Dtype;

    use crate::head::pass::PackedBatch;
    use crate::train::states::{MicroBatch, Wanted};

    /// A batch of which no more is known than what is wanted.
    pub fn batch(targets: Wanted) -> MicroBatch {
        let packed = PackedBatch { taps: Vec::new(), formats: Vec::new(), lengths: Vec::new(), rows: Vec::new() };
        MicroBatch { packed, x: Vec::new(), dtype: Dtype::Float32, hidden_size: 1, targets, replayed: 0, tokens: 0 }
    }

    pub fn close(found: &[f32], expected: &[f32]) {
        let near = found.len() == expected.len() && found.iter().zip(expected).all(|(a, b)| (a - b).abs() <= 1e-6 * b.abs().max(1.0));
        assert!(near, "{found:?}, expected {expected:?}");
    }
}
