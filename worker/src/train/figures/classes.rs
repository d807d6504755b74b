//! Figures of classifiers, of one label a sample or of several. Each sample counts as often as it is told to. Pure.

use super::ranks::Ranked;
use crate::train::states::Wanted;

/// Bins of the calibration error.
const BINS: usize = 15;

/// What a classifier said of some samples, and what their labels are.
pub struct Classes {
    labels: usize,
    /// Whether a sample may have any number of labels.
    several: bool,
    /// `[samples, labels]`.
    probabilities: Vec<f64>,
    /// Labels of each sample, ascending.
    wanted: Vec<Vec<u32>>,
    /// Those that the classifier gave it.
    said: Vec<Vec<u32>>,
}

impl Classes {
    /// Of a classifier whose `logits` are `[samples, labels]`: of one that gives each sample one label, or of one that gives it any number.
    pub fn new(labels: usize, logits: &[f32], wanted: &Wanted) -> Self {
        let rows = || logits.chunks_exact(labels);
        match wanted {
            Wanted::Sets(sets) => Self {
                labels,
                several: true,
                probabilities: logits.iter().map(|logit| 1.0 / (1.0 + (-f64::from(*logit)).exp())).collect(),
                wanted: sets.clone(),
                said: rows().map(given).collect(),
            },
            one => Self {
                labels,
                several: false,
                probabilities: rows().flat_map(softmax).collect(),
                wanted: one.indices().iter().map(|&label| vec![label]).collect(),
                said: rows().map(|row| vec![highest(row) as u32]).collect(),
            },
        }
    }

    /// Mean over the labels of 2·TP / (2·TP + FP + FN). A label that no sample has and nothing was given is left out, where a sample has one label; where it
    /// may have several, it counts 0.
    pub fn macro_f1(&self, counts: &[u32]) -> Option<f64> {
        let (mut both, mut either) = (vec![0.0; self.labels], vec![0.0; self.labels]);
        for ((said, wanted), &count) in self.said.iter().zip(&self.wanted).zip(counts) {
            said.iter().chain(wanted).for_each(|&label| either[label as usize] += f64::from(count));
            said.iter().filter(|label| wanted.contains(label)).for_each(|&label| both[label as usize] += f64::from(count));
        }
        let score = |(both, either): (&f64, &f64)| if *either > 0.0 { Some(2.0 * both / either) } else { self.several.then_some(0.0) };
        mean(both.iter().zip(&either).map(score))
    }

    /// Mean over the labels of the area under the ROC curve of a label against all others. A label that all samples have, or none, has none.
    pub fn roc_auc(&self) -> impl Fn(&[u32]) -> Option<f64> {
        let ranked = |label: usize| {
            let scores: Vec<f64> = self.probabilities.iter().skip(label).step_by(self.labels).copied().collect();
            Ranked::new(&scores)
        };
        let ranked: Vec<Ranked> = (0..self.labels).map(ranked).collect();
        move |counts| {
            let of = |(label, ranked): (usize, &Ranked)| ranked.auc(counts, |sample| self.wanted[sample].contains(&(label as u32)));
            mean(ranked.iter().enumerate().map(of))
        }
    }

    /// Expected calibration error (C. Guo and others, On calibration of modern neural networks, 2017): over 15 equal bins of the confidence of a decision, the
    /// mean distance of confidence and share of right ones. Where a sample may have several labels, there is a decision for each of them.
    pub fn calibration_error(&self) -> impl Fn(&[u32]) -> Option<f64> {
        let decisions: Vec<(u32, f64, bool)> = self.decisions().collect();
        move |counts| {
            let (mut gaps, mut all) = ([0.0; BINS], 0.0);
            for &(sample, confidence, right) in &decisions {
                let (count, bin) = (f64::from(counts[sample as usize]), (confidence * BINS as f64).ceil() as usize);
                gaps[bin.clamp(1, BINS) - 1] += count * (confidence - f64::from(u8::from(right)));
                all += count;
            }
            (all > 0.0).then(|| gaps.iter().map(|gap: &f64| gap.abs()).sum::<f64>() / all)
        }
    }

    /// Sample, confidence, and whether it was right.
    fn decisions(&self) -> impl Iterator<Item = (u32, f64, bool)> {
        let of = move |(sample, row): (usize, &[f64])| {
            let (said, wanted) = (&self.said[sample], &self.wanted[sample]);
            let confidence = |label: u32| row[label as usize].max(if self.several { 1.0 - row[label as usize] } else { 0.0 });
            let decided: Vec<u32> = if self.several { (0..self.labels as u32).collect() } else { said.clone() };
            decided
                .into_iter()
                .map(move |label| (sample as u32, confidence(label), said.contains(&label) == wanted.contains(&label)))
                .collect::<Vec<_>>()
        };
        self.probabilities.chunks_exact(self.labels).enumerate().flat_map(of)
    }
}

/// Index of the highest, the first of several.
pub fn highest(row: &[f32]) -> usize {
    (0..row.len()).rev().max_by(|&left, &right| row[left].total_cmp(&row[right])).unwrap_or(0)
}

/// The labels that are at least as likely as not.
pub fn given(row: &[f32]) -> Vec<u32> {
    row.iter().zip(0..).filter(|(logit, _)| **logit >= 0.0).map(|(_, label)| label).collect()
}

fn softmax(row: &[f32]) -> Vec<f64> {
    let most = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let exponentials: Vec<f64> = row.iter().map(|logit| (f64::from(*logit) - f64::from(most)).exp()).collect();
    let sum: f64 = exponentials.iter().sum();
    exponentials.into_iter().map(|value| value / sum).collect()
}

/// Of those that there are.
fn mean(values: impl Iterator<Item = Option<f64>>) -> Option<f64> {
    let (sum, count) = values.flatten().fold((0.0, 0.0), |(sum, count), value| (sum + value, count + 1.0));
    (count > 0.0).then(|| sum / count)
}
