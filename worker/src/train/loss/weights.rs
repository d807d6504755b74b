//! How much the samples of each label count. Pure.

use carryon_crds::job::{ClassWeights, Task};

use crate::train::data::Counts;
use crate::train::error::TrainError;

/// Weights of `labels`, by what the training samples are: 1 where the job says nothing.
///
/// # Errors
/// A label that there is none of, by its name; a weight that is none.
pub fn of(asked: Option<&ClassWeights>, task: Task, labels: &[String], counts: &Counts) -> Result<Vec<f32>, TrainError> {
    let refuse = |member: &str, reason: String| Err(TrainError::Configuration(format!("training.classWeights.{member}: {reason}")));
    let values = match asked {
        None => return Ok(vec![1.0; labels.len()]),
        Some(ClassWeights { values: Some(values), .. }) => values,
        Some(ClassWeights { values: None, .. }) => {
            let samples = |label: usize| counts.balance.samples.get(label).copied().unwrap_or(0);
            return match (0..labels.len()).find(|label| samples(*label) == 0) {
                Some(label) => refuse("balanced", format!("no training sample has label {:?}", labels[label])),
                None => Ok((0..labels.len()).map(|label| balanced(task, samples(label), counts.samples, labels.len())).collect()),
            };
        }
    };
    match values.iter().find(|(name, value)| !labels.contains(name) || !(0.0..=1e6).contains(*value)) {
        Some((name, _)) if !labels.contains(name) => refuse("values", format!("{name:?} is not in head.labels")),
        Some((name, value)) => refuse("values", format!("{name:?} is {value}, not from 0 to 1000000")),
        None => Ok(labels.iter().map(|label| values.get(label).map_or(1.0, |value| *value as f32)).collect()),
    }
}

/// With `has` of `all` samples having the label: scikit-learn's `balanced`, and what PyTorch advises for `pos_weight`.
fn balanced(task: Task, has: u64, all: u64, labels: usize) -> f32 {
    let (has, all) = (has as f64, all as f64);
    (if task == Task::MultiLabelClassification { (all - has) / has } else { all / (labels as f64 * has) }) as f32
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use carryon_crds::job::Balanced;

    use super::*;
    use crate::train::data::{Balance, Target};

    fn weights(asked: Option<ClassWeights>, task: Task) -> Result<Vec<f32>, String> {
        let mut balance = Balance::default();
        [0, 0, 0, 1].iter().for_each(|label| balance.count(&Target::Label(*label)));
        let counts = Counts { samples: 4, balance, ..Counts::default() };
        of(asked.as_ref(), task, &["ham".to_owned(), "spam".to_owned()], &counts).map_err(|error| error.to_string())
    }

    /// `sklearn.utils.class_weight.compute_class_weight("balanced", classes=[0, 1], y=[0, 0, 0, 1])`
    #[test]
    fn balanced_weights_are_those_of_scikit_learn() {
        let balanced = || Some(ClassWeights { balanced: Some(Balanced {}), values: None });
        assert_eq!(weights(balanced(), Task::Classification).unwrap(), [4.0 / 6.0, 2.0]);
        assert_eq!(weights(balanced(), Task::MultiLabelClassification).unwrap(), [1.0 / 3.0, 3.0]);
        assert_eq!(weights(None, Task::Classification).unwrap(), [1.0, 1.0]);
    }

    #[test]
    fn weights_of_labels_that_are_not_there_are_refused_by_name() {
        let values = |name: &str, value| Some(ClassWeights { balanced: None, values: Some(BTreeMap::from([(name.to_owned(), value)])) });
        assert_eq!(weights(values("spam", 3.0), Task::Classification).unwrap(), [1.0, 3.0]);
        let refused = |asked| weights(asked, Task::Classification).unwrap_err();
        assert_eq!(refused(values("eggs", 3.0)), "training.classWeights.values: \"eggs\" is not in head.labels");
        assert_eq!(refused(values("spam", -1.0)), "training.classWeights.values: \"spam\" is -1, not from 0 to 1000000");
    }
}
