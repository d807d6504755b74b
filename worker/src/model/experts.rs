//! Which experts a row goes to: pure, from the router's logits.

use super::config::{ExpertsConfig, Groups, Scores};

/// The rows of a pass, dealt to experts: those of the first expert come first, each expert's in order.
#[derive(Debug, Default, PartialEq)]
pub struct Dealt {
    /// Rows that each expert takes.
    pub counts: Vec<usize>,
    /// The rows, one expert's after the other's. With ascending experts the sum of a row has one order.
    pub rows: Vec<u32>,
    /// What each expert's result counts for its row.
    pub weights: Vec<f32>,
}

/// Deals rows by the logits of their router, rows × experts: each goes to the `top` experts with the largest scores, of equals the first ones. What
/// `bias` (empty, or of each expert) adds to a score counts for the choice alone.
pub fn deal(logits: &[f32], bias: &[f32], config: &ExpertsConfig) -> Dealt {
    let mut chosen: Vec<Vec<(u32, f32)>> = vec![Vec::new(); config.count];
    for (row, logits) in logits.chunks_exact(config.count).enumerate() {
        let scores = scores(logits, config.scores);
        let mut choice = scores.clone();
        choice.iter_mut().zip(bias).for_each(|(choice, bias)| *choice += bias);
        if let Some(groups) = &config.groups {
            keep_groups(&mut choice, groups);
        }
        let mut order: Vec<usize> = (0..config.count).collect();
        order.sort_by(|one, other| choice[*other].total_cmp(&choice[*one]));
        let top = &order[..config.top];
        let sum: f32 = match (config.normalise, config.scores) {
            (true, _) => top.iter().map(|expert| scores[*expert]).sum(),
            (false, Scores::Softmax) => scores.iter().sum(),
            (false, Scores::Sigmoid) => 1.0,
        };
        let weight = |expert: usize| config.factor * (scores[expert] / sum.max(f32::MIN_POSITIVE));
        top.iter().for_each(|expert| chosen[*expert].push((row as u32, weight(*expert))));
    }
    let counts = chosen.iter().map(Vec::len).collect();
    let (rows, weights) = chosen.into_iter().flatten().unzip();
    Dealt { counts, rows, weights }
}

/// Scores of a row; those of a softmax lack their common divisor.
fn scores(logits: &[f32], kind: Scores) -> Vec<f32> {
    match kind {
        Scores::Softmax => {
            let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            logits.iter().map(|logit| (logit - largest).exp()).collect()
        }
        Scores::Sigmoid => logits.iter().map(|logit| 1.0 / (1.0 + (-logit).exp())).collect(),
    }
}

/// Takes the experts of all but the best groups out of the choice.
fn keep_groups(choice: &mut [f32], groups: &Groups) {
    let size = choice.len() / groups.count;
    let score = |group: &[f32]| {
        let mut best = group.to_vec();
        best.sort_by(|one, other| other.total_cmp(one));
        best.iter().take(groups.best).sum::<f32>()
    };
    let scores: Vec<f32> = choice.chunks_exact(size).map(score).collect();
    let mut order: Vec<usize> = (0..groups.count).collect();
    order.sort_by(|one, other| scores[*other].total_cmp(&scores[*one]));
    for group in &order[groups.top..] {
        choice[group * size..][..size].fill(f32::NEG_INFINITY);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::Activation;

    fn config(count: usize, top: usize) -> ExpertsConfig {
        let (scores, groups) = (Scores::Softmax, None);
        ExpertsConfig { count, top, width: 8, activation: Activation::Silu, shared: None, scores, groups, normalise: true, factor: 1.0 }
    }

    fn close(found: &[f32], expected: &[f32]) -> bool {
        found.iter().zip(expected).all(|(found, expected)| (found - expected).abs() < 1e-6)
    }

    #[test]
    fn rows_go_to_the_largest_and_of_equals_to_the_first() {
        let mut config = config(4, 2);
        let logits = [0.0, 2f32.ln(), 0.0, -5.0, 1.0, 1.0, 1.0, 1.0];
        let dealt = deal(&logits, &[], &config);
        assert_eq!((dealt.counts, dealt.rows), (vec![2, 2, 0, 0], vec![0, 1, 0, 1]));
        assert!(close(&dealt.weights, &[1.0 / 3.0, 0.5, 2.0 / 3.0, 0.5]), "{:?}", dealt.weights);
        (config.normalise, config.factor) = (false, 2.0);
        assert!(close(&deal(&logits[4..], &[], &config).weights, &[0.5, 0.5]));
    }

    #[test]
    fn a_bias_and_the_groups_decide_who_is_chosen_and_not_what_it_counts() {
        let sigmoid = |logit: f32| 1.0 / (1.0 + (-logit).exp());
        let mut config = ExpertsConfig { scores: Scores::Sigmoid, normalise: false, ..config(4, 1) };
        let logits = [3.0, -3.0, 1.0, 1.5];
        assert_eq!(deal(&logits, &[], &config).counts, [1, 0, 0, 0]);
        let dealt = deal(&logits, &[-1.0, 0.0, 0.0, 0.0], &config);
        assert_eq!((dealt.counts, dealt.weights), (vec![0, 0, 0, 1], vec![sigmoid(1.5)]));
        for (best, expected) in [(1, [1, 0, 0, 0]), (2, [0, 0, 0, 1])] {
            config.groups = Some(Groups { count: 2, top: 1, best });
            assert_eq!(deal(&logits, &[], &config).counts, expected);
        }
    }
}
