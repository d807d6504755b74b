//! Losses of classifiers.

use super::{Loss, Measured};
use crate::train::error::TrainError;
use crate::train::states::MicroBatch;

/// Cross entropy of labels. The base has no loss of its own here: without an output every label is as likely as any other. A mean over samples is not
/// divided by their weights, as PyTorch's is: in a batch of one there would be no weight.
pub struct LabelLoss {
    /// How much a sample counts, by its label.
    pub weights: Vec<f32>,
}

impl Loss for LabelLoss {
    fn measure(&mut self, batch: &MicroBatch, output: Option<Vec<f32>>, gradient: bool) -> Result<Option<Measured>, TrainError> {
        let output = output.as_deref();
        let targets = batch.targets.indices();
        let labels = self.weights.len();
        let nothing = vec![0.0; if output.is_none() { targets.len() * labels } else { 0 }];
        let mut measured = Measured::default();
        for (row, &target) in output.unwrap_or(&nothing).chunks_exact(labels).zip(targets) {
            let weight = f64::from(self.weights[target as usize]);
            let highest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let exponentials: Vec<f64> = row.iter().map(|logit| f64::from(logit - highest).exp()).collect();
            let sum: f64 = exponentials.iter().sum();
            measured.loss.push((weight * (sum.ln() - f64::from(row[target as usize] - highest))) as f32);
            if gradient {
                let hit = |label: usize| f64::from(u8::from(label == target as usize));
                measured
                    .gradient
                    .extend(exponentials.iter().enumerate().map(|(label, value)| (weight * (value / sum - hit(label))) as f32));
            }
        }
        Ok(Some(measured))
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{batch, close};
    use super::*;
    use crate::train::states::Wanted;

    fn measure(weights: &[f32], targets: &[u32], logits: &[f32]) -> Measured {
        let batch = batch(Wanted::Indices(targets.to_vec()));
        LabelLoss { weights: weights.to_vec() }.measure(&batch, Some(logits.to_vec()), true).unwrap().unwrap()
    }

    /// `torch.nn.functional.cross_entropy(torch.tensor([[1., 2., 3.], [0.5, -1., 0.]]), torch.tensor([2, 0]), reduction="none")` and its gradient;
    /// then the same with `weight=torch.tensor([2., 1., .5])`.
    #[test]
    fn label_loss_follows_pytorch() {
        let logits = [1.0, 2.0, 3.0, 0.5, -1.0, 0.0];
        let measured = measure(&[1.0; 3], &[2, 0], &logits);
        close(&measured.loss, &[0.407_606, 0.604_131_34]);
        close(&measured.gradient, &[0.090_030_57, 0.244_728_47, -0.334_759_04, -0.453_451_5, 0.121_951_65, 0.331_498_98]);
        let measured = measure(&[2.0, 1.0, 0.5], &[2, 0], &logits);
        close(&measured.loss, &[0.203_802_97, 1.208_261_3]);
        close(&measured.gradient, &[0.045_015_29, 0.122_364_245, -0.167_379_5, -0.906_901_24, 0.243_903_26, 0.662_997_9]);
    }

    #[test]
    fn infinite_logits_give_a_loss_that_is_no_number() {
        assert!(measure(&[1.0; 2], &[0], &[f32::NAN, 0.0]).loss[0].is_nan());
    }

    #[test]
    fn without_an_output_every_label_is_as_likely() {
        let batch = batch(Wanted::Indices(vec![3]));
        let measured = LabelLoss { weights: vec![1.0; 4] }.measure(&batch, None, false).unwrap().unwrap();
        close(&measured.loss, &[4f32.ln()]);
    }
}
