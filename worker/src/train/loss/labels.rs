//! Losses of classifiers.

use super::{Loss, Measured};
use crate::train::error::TrainError;
use crate::train::states::MicroBatch;

/// Cross entropy of labels. The base has no loss of its own here: without an output every label is as likely as any other. A mean over samples is not
/// divided by their weights, as PyTorch's is: in a batch of one there would be no weight. With smoothing ε of L labels a sample with label y is to have
/// 1 - ε + ε/L of y and ε/L of each other, each of which counts by its own weight.
pub struct LabelLoss {
    /// How much a sample counts, by its label.
    pub weights: Vec<f32>,
    /// Share of a label's weight that goes to all labels alike, in training.
    pub smoothing: f64,
}

impl Loss for LabelLoss {
    fn measure(&mut self, batch: &MicroBatch, output: Option<Vec<f32>>, gradient: bool) -> Result<Option<Measured>, TrainError> {
        let output = output.as_deref();
        let targets = batch.targets.indices();
        let labels = self.weights.len();
        let nothing = vec![0.0; if output.is_none() { targets.len() * labels } else { 0 }];
        // Held-out samples are measured as they are.
        let smoothing = if gradient { self.smoothing } else { 0.0 };
        let weight = |label: usize| f64::from(self.weights[label]);
        let share = smoothing / labels as f64;
        let shares = share * (0..labels).map(weight).sum::<f64>();
        let mut measured = Measured::default();
        for (row, &target) in output.unwrap_or(&nothing).chunks_exact(labels).zip(targets) {
            let target = target as usize;
            let own = (1.0 - smoothing) * weight(target);
            let highest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let exponentials: Vec<f64> = row.iter().map(|logit| f64::from(logit - highest).exp()).collect();
            let sum: f64 = exponentials.iter().sum();
            let loss = |label: usize| sum.ln() - f64::from(row[label] - highest);
            let smoothed = if share > 0.0 { (0..labels).map(|label| share * weight(label) * loss(label)).sum() } else { 0.0 };
            measured.loss.push((own * loss(target) + smoothed) as f32);
            if gradient {
                let hit = |label: usize| f64::from(u8::from(label == target));
                measured.gradient.extend(exponentials.iter().enumerate().map(|(label, value)| {
                    let probability = value / sum;
                    (own * (probability - hit(label)) + (shares * probability - share * weight(label))) as f32
                }));
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
        smoothed(0.0, weights, targets, logits, true)
    }

    fn smoothed(smoothing: f64, weights: &[f32], targets: &[u32], logits: &[f32], gradient: bool) -> Measured {
        let batch = batch(Wanted::Indices(targets.to_vec()));
        LabelLoss { weights: weights.to_vec(), smoothing }.measure(&batch, Some(logits.to_vec()), gradient).unwrap().unwrap()
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

    /// The same two with `label_smoothing=.1`; held-out samples are measured without.
    #[test]
    fn smoothed_labels_follow_pytorch_in_training_and_are_none_in_evaluation() {
        let logits = [1.0, 2.0, 3.0, 0.5, -1.0, 0.0];
        let measured = smoothed(0.1, &[1.0; 3], &[2, 0], &logits, true);
        close(&measured.loss, &[0.507_605_9, 0.670_797_35]);
        close(&measured.gradient, &[0.056_697_246, 0.211_395_16, -0.268_092_33, -0.386_783_96, 0.088_618_29, 0.298_165_62]);
        let measured = smoothed(0.1, &[2.0, 1.0, 0.5], &[2, 0], &logits, true);
        close(&measured.loss, &[0.397_643_36, 1.216_250_4]);
        close(&measured.gradient, &[-0.015_649_341, 0.105_346_14, -0.089_696_77, -0.819_113_73, 0.200_407_28, 0.618_706_3]);
        close(&smoothed(0.1, &[1.0; 3], &[2, 0], &logits, false).loss, &[0.407_606, 0.604_131_34]);
    }

    #[test]
    fn infinite_logits_give_a_loss_that_is_no_number() {
        assert!(measure(&[1.0; 2], &[0], &[f32::NAN, 0.0]).loss[0].is_nan());
    }

    #[test]
    fn without_an_output_every_label_is_as_likely() {
        let batch = batch(Wanted::Indices(vec![3]));
        let measured = LabelLoss { weights: vec![1.0; 4], smoothing: 0.0 }.measure(&batch, None, false).unwrap().unwrap();
        close(&measured.loss, &[4f32.ln()]);
    }
}
