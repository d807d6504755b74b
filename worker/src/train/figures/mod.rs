//! How good a head is on held-out samples: figures with 95 % intervals, from what it put out and what was right.

mod classes;
mod interval;
mod ranks;
mod recall;

use std::collections::BTreeMap;

use carryon_crds::job::{Metric, Task};
use carryon_crds::wire::{Figure, HeadShape};

use crate::train::states::Wanted;
use classes::{Classes, highest};
use interval::bootstrap;
pub use interval::share;
use ranks::{Ranked, spearman};

/// Most outputs that are kept. Of more, only what can be counted on the way is told.
const KEPT: usize = 1 << 22;

/// Figures by name, each with its 95 % interval.
pub type Figures = BTreeMap<String, Figure>;

/// What a head put out for samples, and what they have for labels.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Predictions {
    /// Classification: samples by label (row) and prediction (column).
    pub confusion: Vec<Vec<u64>>,
    task: Task,
    /// Outputs of a sample; 0 where they say nothing by themselves.
    width: usize,
    samples: u64,
    /// Samples of which it can be said whether they are right, and those that are.
    judged: u64,
    right: u64,
    /// `[samples, width]`, and what is wanted of each; of the first ones, when there are too many.
    outputs: Vec<f32>,
    wanted: Option<Wanted>,
}

impl Predictions {
    /// None yet, of a head of `shape`.
    pub fn new(shape: &HeadShape) -> Self {
        let labels = if shape.task == Task::Classification { shape.outputs() } else { 0 };
        Self { confusion: vec![vec![0; labels]; labels], task: shape.task, width: shape.outputs(), ..Self::default() }
    }

    /// Takes the outputs for some samples, row-major, and what is wanted of them.
    pub fn add(&mut self, outputs: &[f32], wanted: &Wanted) {
        if self.width == 0 {
            return;
        }
        let rows = outputs.chunks_exact(self.width);
        match wanted {
            Wanted::Indices(labels) => {
                self.judged += labels.len() as u64;
                for (row, &label) in rows.zip(labels) {
                    let said = highest(row);
                    self.confusion[label as usize][said] += 1;
                    self.right += u64::from(said == label as usize);
                }
            }
            Wanted::Sets(sets) => {
                self.judged += sets.len() as u64;
                self.right += rows.zip(sets).filter(|(row, set)| classes::given(row) == **set).count() as u64;
            }
            Wanted::Groups(_) if self.task != Task::Embedding => self.add_pairs(outputs),
            Wanted::Values(_) | Wanted::Groups(_) | Wanted::Answers { .. } => {}
        }
        self.samples += wanted.len() as u64;
        if self.outputs.len() + outputs.len() <= KEPT {
            self.outputs.extend_from_slice(outputs);
            match &mut self.wanted {
                Some(kept) => kept.extend(wanted),
                none => *none = Some(wanted.clone()),
            }
        }
    }

    /// Takes the scores of pairs of texts, of which the first was chosen.
    pub fn add_pairs(&mut self, scores: &[f32]) {
        let pairs = scores.as_chunks::<2>().0;
        self.judged += pairs.len() as u64;
        self.right += pairs.iter().filter(|[chosen, rejected]| chosen > rejected).count() as u64;
    }

    /// Share of samples of which a classifier gets all labels right, or of pairs of which the chosen text scores higher.
    pub fn accuracy(&self) -> Option<f64> {
        share(self.right, self.judged).map(|figure| figure.value)
    }

    /// One figure without its interval, which is what takes long. None where it cannot be told: of other tasks, of outputs that are not finite or too many.
    pub fn value(&self, metric: Metric) -> Option<f64> {
        if metric == Metric::Accuracy {
            return self.accuracy();
        }
        let wanted = self.whole()?;
        let once = vec![1; wanted.len()];
        match (metric, wanted) {
            // Their order is that of the outputs, whatever their scale.
            (Metric::Spearman, Wanted::Values(values)) => {
                let outputs: Vec<f64> = self.outputs.iter().copied().map(f64::from).collect();
                spearman(&Ranked::new(&outputs), &Ranked::new(values), &once)
            }
            (Metric::RecallAt1, Wanted::Groups(pairs)) if self.task == Task::Embedding => {
                let first = recall::ranks(&self.outputs, self.width).into_iter().filter(|rank| *rank < 1).count();
                Some(first as f64 / *pairs as f64)
            }
            (Metric::MacroF1, labels) if self.task.has_labels() => Classes::new(self.width, &self.outputs, labels).macro_f1(&once),
            (Metric::RocAuc, labels) if self.task.has_labels() => Classes::new(self.width, &self.outputs, labels).roc_auc()(&once),
            _ => None,
        }
    }

    /// What is wanted of all samples, where all their outputs were kept and are finite.
    fn whole(&self) -> Option<&Wanted> {
        let whole = self.wanted.as_ref().filter(|wanted| wanted.len() as u64 == self.samples);
        whole.filter(|_| self.outputs.iter().all(|output| output.is_finite()))
    }

    /// All figures; of a regression, mean and standard deviation of the training labels are the `scale` of its outputs. An output that is not finite
    /// leaves what depends on it out.
    pub fn figures(&self, scale: (f64, f64)) -> Figures {
        let mut figures = Figures::new();
        let mut add = |name: &str, figure: Option<Figure>| figures.extend(figure.map(|figure| (name.to_owned(), figure)));
        add("accuracy", share(self.right, self.judged));
        let Some(wanted) = self.whole() else { return figures };
        let bootstrap = |measure: &dyn Fn(&[u32]) -> Option<f64>| bootstrap(wanted.len(), self.outputs.len(), measure);
        match wanted {
            Wanted::Values(values) => {
                let outputs: Vec<f64> = self.outputs.iter().map(|output| scale.0 + scale.1 * f64::from(*output)).collect();
                let ranked = [&outputs, values].map(|numbers| Ranked::new(numbers));
                add("spearman", bootstrap(&|counts| spearman(&ranked[0], &ranked[1], counts)));
                add("mean_squared_error", bootstrap(&|counts| squared_error(&outputs, values, counts)));
            }
            Wanted::Groups(pairs) if self.task == Task::Embedding => {
                let ranks = recall::ranks(&self.outputs, self.width);
                for k in [1, 5, 10] {
                    let found = ranks.iter().filter(|rank| **rank < k).count();
                    add(&format!("recall_at_{k}"), share(found as u64, *pairs as u64));
                }
            }
            Wanted::Groups(_) | Wanted::Answers { .. } => {}
            labels => {
                let classes = Classes::new(self.width, &self.outputs, labels);
                add("macro_f1", bootstrap(&|counts| classes.macro_f1(counts)));
                add("roc_auc", bootstrap(&classes.roc_auc()));
                add("ece", bootstrap(&classes.calibration_error()));
            }
        }
        figures
    }
}

/// Mean over the samples, each of which counts as often as it is told to.
fn squared_error(outputs: &[f64], values: &[f64], counts: &[u32]) -> Option<f64> {
    let errors = outputs.iter().zip(values).zip(counts).map(|((output, value), count)| f64::from(*count) * (output - value).powi(2));
    Some(errors.sum::<f64>() / counts.iter().map(|count| f64::from(*count)).sum::<f64>())
}

#[cfg(test)]
mod tests;
