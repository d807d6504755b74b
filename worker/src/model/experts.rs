//! Which experts a row goes to: pure, from the router's logits.

use super::config::ExpertsConfig;

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

/// Deals rows by the logits of their router, rows × experts: each goes to the `top` experts with the largest softmax, of equals the first ones.
pub fn deal(logits: &[f32], config: &ExpertsConfig) -> Dealt {
    let mut chosen: Vec<Vec<(u32, f32)>> = vec![Vec::new(); config.count];
    for (row, logits) in logits.chunks_exact(config.count).enumerate() {
        let mut order: Vec<usize> = (0..config.count).collect();
        order.sort_by(|one, other| logits[*other].total_cmp(&logits[*one]));
        let largest = logits[order[0]];
        let weight = |expert: usize| (logits[expert] - largest).exp();
        let top = &order[..config.top];
        let sum: f32 = match config.normalise {
            true => top.iter().copied().map(weight).sum(),
            false => (0..config.count).map(weight).sum(),
        };
        top.iter().for_each(|expert| chosen[*expert].push((row as u32, weight(*expert) / sum)));
    }
    let counts = chosen.iter().map(Vec::len).collect();
    let (rows, weights) = chosen.into_iter().flatten().unzip();
    Dealt { counts, rows, weights }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::Activation;

    #[test]
    fn rows_go_to_the_largest_and_of_equals_to_the_first() {
        let mut config = ExpertsConfig { count: 4, top: 2, width: 8, activation: Activation::Silu, normalise: true };
        let logits = [0.0, 2f32.ln(), 0.0, -5.0, 1.0, 1.0, 1.0, 1.0];
        let dealt = deal(&logits, &config);
        assert_eq!((dealt.counts, dealt.rows), (vec![2, 2, 0, 0], vec![0, 1, 0, 1]));
        let close = |found: &[f32], expected: &[f32]| found.iter().zip(expected).all(|(found, expected)| (found - expected).abs() < 1e-6);
        assert!(close(&dealt.weights, &[1.0 / 3.0, 0.5, 2.0 / 3.0, 0.5]), "{:?}", dealt.weights);
        config.normalise = false;
        assert!(close(&deal(&logits[4..], &config).weights, &[0.25, 0.25]));
    }
}
