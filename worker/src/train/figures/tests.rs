//! Against scikit-learn and scipy: `tests/oracles/figures.py` writes inputs and what these found.

use serde::Deserialize;

use super::*;

/// As near as sums in another order come.
const TOLERANCE: f64 = 1e-6;

#[derive(Deserialize)]
struct Case {
    name: String,
    task: Task,
    /// Outputs of a sample, or of a pair of them.
    labels: usize,
    outputs: Vec<f32>,
    targets: Targets,
    /// Value, low, high.
    figures: BTreeMap<String, [f64; 3]>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Targets {
    Labels(Vec<u32>),
    Sets(Vec<Vec<u32>>),
    Values(Vec<f64>),
    /// As many pairs.
    Groups(usize),
}

impl Targets {
    /// As batches come.
    fn batches(self, size: usize) -> Vec<Wanted> {
        match self {
            Self::Labels(labels) => labels.chunks(size).map(|labels| Wanted::Indices(labels.to_vec())).collect(),
            Self::Sets(sets) => sets.chunks(size).map(|sets| Wanted::Sets(sets.to_vec())).collect(),
            Self::Groups(pairs) => (0..pairs.div_ceil(size)).map(|batch| Wanted::Groups(size.min(pairs - batch * size))).collect(),
            Self::Values(values) => values.chunks(size).map(|values| Wanted::Values(values.to_vec())).collect(),
        }
    }
}

fn shape(task: Task, labels: usize) -> HeadShape {
    let dimensions = (task == Task::Embedding).then_some(labels / 2);
    let labels: Vec<String> = (0..if task.has_labels() { labels } else { 0 }).map(|label| label.to_string()).collect();
    serde_json::from_value(serde_json::json!({
        "format_version": 1, "task": task, "taps": {"layers": [], "final": true}, "hidden_size": 8, "width": 8, "blocks": 0, "heads": 1,
        "feed_forward": 32, "gate": false, "alpha": 1.0, "window": 8, "rope_theta": 1e4, "norm_epsilon": 1e-5, "labels": labels, "dimensions": dimensions,
    }))
    .unwrap()
}

#[test]
fn figures_are_those_of_scikit_learn_and_scipy() {
    let cases: Vec<Case> = serde_json::from_str(include_str!("../../../../tests/oracles/fixtures/figures.json")).unwrap();
    for case in cases {
        let mut predictions = Predictions::new(&shape(case.task, case.labels));
        for (outputs, targets) in case.outputs.chunks(7 * case.labels).zip(case.targets.batches(7)) {
            predictions.add(outputs, &targets);
        }
        let found = predictions.figures((0.0, 1.0));
        assert_eq!(found.keys().collect::<Vec<_>>(), case.figures.keys().collect::<Vec<_>>(), "{}", case.name);
        for metric in [Metric::Loss, Metric::Accuracy, Metric::MacroF1, Metric::RocAuc, Metric::Spearman, Metric::RecallAt1] {
            let figure = found.get(metric.name()).map(|figure| figure.value);
            assert_eq!(predictions.value(metric), figure, "{} {metric:?}", case.name);
            assert!(figure.is_none() || metric.fits(case.task), "{} {metric:?}", case.name);
        }
        for (name, expected) in &case.figures {
            let Figure { value, low, high } = found[name];
            for (found, expected) in [value, low, high].into_iter().zip(expected) {
                assert!((found - expected).abs() <= TOLERANCE, "{} {name}: {:?}, expected {expected:?}", case.name, [value, low, high]);
            }
        }
    }
}

#[test]
fn of_outputs_that_are_not_finite_only_what_was_counted_is_told() {
    let mut predictions = Predictions::new(&shape(Task::Classification, 2));
    predictions.add(&[f32::NAN, 0.0, 1.0, 0.0], &Wanted::Indices(vec![0, 0]));
    assert_eq!(predictions.figures((0.0, 1.0)).into_keys().collect::<Vec<_>>(), ["accuracy"]);
    assert_eq!(Predictions::new(&shape(Task::Classification, 2)).figures((0.0, 1.0)), Figures::new(), "of no samples nothing");
}
