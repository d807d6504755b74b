//! The loss of embeddings: a text is to be nearer to its own partner than to those of the others in its batch.

use super::{Loss, Measured};
use crate::train::error::TrainError;
use crate::train::states::MicroBatch;

/// InfoNCE (A. van den Oord and others, 2018) with in-batch negatives, as sentence-transformers' MultipleNegativesRankingLoss has it: cross entropy of the
/// cosines of each anchor with all positives of its micro-batch, over the temperature, where its own is right. Rows come in pairs, the anchor first.
pub struct ContrastLoss {
    /// Numbers of an embedding.
    pub dimensions: usize,
    /// What cosines are divided by.
    pub temperature: f64,
}

impl ContrastLoss {
    /// Where the job asks for none: that of sentence-transformers, whose scale is 20.
    pub const TEMPERATURE: f64 = 0.05;
}

/// An embedding of length 1, and the length it had.
struct Unit {
    values: Vec<f64>,
    length: f64,
}

impl Unit {
    fn of(row: &[f32]) -> Self {
        let length = row.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>().sqrt().max(1e-12);
        Self { values: row.iter().map(|value| f64::from(*value) / length).collect(), length }
    }

    fn dot(&self, other: &[f64]) -> f64 {
        self.values.iter().zip(other).map(|(left, right)| left * right).sum()
    }

    /// From the gradient by what has length 1 to that by what had another.
    fn back(&self, gradient: &[f64]) -> impl Iterator<Item = f32> {
        let along = self.dot(gradient);
        self.values.iter().zip(gradient).map(move |(value, gradient)| ((gradient - along * value) / self.length) as f32)
    }
}

fn add(to: &mut [f64], slope: f64, values: &[f64]) {
    to.iter_mut().zip(values).for_each(|(to, value)| *to += slope * value);
}

impl Loss for ContrastLoss {
    fn measure(&mut self, batch: &MicroBatch, output: Option<Vec<f32>>, gradient: bool) -> Result<Option<Measured>, TrainError> {
        let output = output.as_deref();
        let count = batch.targets.len();
        let Some(output) = output else { return Ok(Some(Measured { loss: vec![(count as f32).ln(); count], ..Measured::default() })) };
        let units: Vec<Unit> = output.chunks_exact(self.dimensions).map(Unit::of).collect();
        let (anchors, positives): (Vec<_>, Vec<_>) = units.as_chunks::<2>().0.iter().map(|[anchor, positive]| (anchor, positive)).unzip();
        let mut by_unit = vec![vec![0.0; self.dimensions]; if gradient { units.len() } else { 0 }];
        let mut measured = Measured::default();
        for (own, anchor) in anchors.iter().enumerate() {
            let logits: Vec<f64> = positives.iter().map(|positive| anchor.dot(&positive.values) / self.temperature).collect();
            let most = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let sum: f64 = logits.iter().map(|logit| (logit - most).exp()).sum();
            measured.loss.push((sum.ln() + most - logits[own]) as f32);
            if !gradient {
                continue;
            }
            for (other, (positive, logit)) in positives.iter().zip(&logits).enumerate() {
                let hit = if other == own { 1.0 } else { 0.0 };
                let slope = ((logit - most).exp() / sum - hit) / self.temperature;
                add(&mut by_unit[2 * own], slope, &positive.values);
                add(&mut by_unit[2 * other + 1], slope, &anchor.values);
            }
        }
        measured.gradient = units.iter().zip(&by_unit).flat_map(|(unit, gradient)| unit.back(gradient)).collect();
        Ok(Some(measured))
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{batch, close};
    use super::*;
    use crate::train::states::Wanted;

    /// With `n = torch.nn.functional.normalize`: `cross_entropy(n(anchors) @ n(positives).T / .5, torch.arange(2), reduction="none")` and its gradient.
    #[test]
    fn contrast_loss_follows_pytorch() {
        let rows = [1.0, 2.0, 0.5, -1.0, 0.5, 2.0, 0.0, 1.0, 3.0, 2.0, 1.0, -1.0];
        let measured = ContrastLoss { dimensions: 3, temperature: 0.5 }
            .measure(&batch(Wanted::Groups(2)), Some(rows.to_vec()), true)
            .unwrap()
            .unwrap();
        close(&measured.loss, &[1.217_288_7, 2.405_155_3]);
        let anchors = [[0.653_737_2, -0.115_545_31, -0.845_293_2], [-0.720_906_57, -0.319_542_44, 0.106_514_15]];
        let positives = [[-0.008_356_393, -0.415_153_35, 0.099_610_14], [-0.198_407_03, 0.042_187_31, -0.354_626_74]];
        close(&measured.gradient, &[anchors[0], positives[0], anchors[1], positives[1]].concat());
    }
}
