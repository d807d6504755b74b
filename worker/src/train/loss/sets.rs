//! The loss of classifiers that give a text any number of labels.

use super::{Loss, Measured};
use crate::train::error::TrainError;
use crate::train::states::{MicroBatch, Wanted};

/// Binary cross entropy of each label, and its mean over the labels, as PyTorch's `BCEWithLogitsLoss` has it.
pub struct SetLoss {
    /// How much a sample that has the label counts beside one that has not.
    pub weights: Vec<f32>,
}

impl Loss for SetLoss {
    fn measure(&mut self, batch: &MicroBatch, output: Option<Vec<f32>>, gradient: bool) -> Result<Option<Measured>, TrainError> {
        let output = output.as_deref();
        let Wanted::Sets(sets) = &batch.targets else { return Ok(Some(Measured::default())) };
        let labels = self.weights.len();
        let nothing = vec![0.0; if output.is_none() { sets.len() * labels } else { 0 }];
        let share = 1.0 / labels as f64;
        let mut measured = Measured::default();
        for (row, set) in output.unwrap_or(&nothing).chunks_exact(labels).zip(sets) {
            let mut sum = 0.0;
            for (label, (&logit, &weight)) in row.iter().zip(&self.weights).enumerate() {
                let (z, weight) = (f64::from(logit), f64::from(weight));
                let has = set.contains(&(label as u32));
                sum += if has { weight * softplus(-z) } else { softplus(z) };
                if gradient {
                    let slope = if has { -weight / (1.0 + z.exp()) } else { 1.0 / (1.0 + (-z).exp()) };
                    measured.gradient.push((share * slope) as f32);
                }
            }
            measured.loss.push((share * sum) as f32);
        }
        Ok(Some(measured))
    }
}

/// ln(1 + eᶻ), for large z too.
pub(super) fn softplus(z: f64) -> f64 {
    z.max(0.0) + (-z.abs()).exp().ln_1p()
}

#[cfg(test)]
mod tests {
    use super::super::tests::{batch, close};
    use super::*;

    /// `torch.nn.BCEWithLogitsLoss(pos_weight=torch.tensor([2., 1., .5]), reduction="none")(torch.tensor([[1., -2., 3.], [.5, 80., -80.]]),
    /// torch.tensor([[1., 0., 1.], [0., 0., 1.]])).mean(1)` and its gradient.
    #[test]
    fn set_loss_follows_pytorch() {
        let mut loss = SetLoss { weights: vec![2.0, 1.0, 0.5] };
        let measured = loss
            .measure(&batch(Wanted::Sets(vec![vec![0, 2], vec![2]])), Some(vec![1.0, -2.0, 3.0, 0.5, 80.0, -80.0]), true)
            .unwrap()
            .unwrap();
        close(&measured.loss, &[0.259_248_38, 40.324_69]);
        close(&measured.gradient, &[-0.179_294_27, 0.039_734_308, -0.007_904_312, 0.207_486_45, 0.333_333_34, -0.166_666_67]);
        let nothing = loss.measure(&batch(Wanted::Sets(vec![vec![]])), None, false).unwrap().unwrap();
        close(&nothing.loss, &[std::f32::consts::LN_2]);
    }
}
