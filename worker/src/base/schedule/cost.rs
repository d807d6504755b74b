//! What steps and slices cost, learnt from those that ran.

use super::serving::Demand;

/// How far one step moves what is known.
const LEARNING: f64 = 0.25;
/// Most by which one step may take longer than expected: one that the machine held up says little.
const OUTLIER: f64 = 2.0;
/// Seconds that are assumed before the first step has run: fixed, a token of a prompt, a decoded token. Only their proportions last.
const ASSUMED: [f64; 3] = [0.01, 0.001, 0.001];

/// Tokens of a serving step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tokens {
    /// Of prompts.
    pub prefill: usize,
    /// One of each sequence that decodes.
    pub decode: usize,
}

impl Tokens {
    /// Those that a step runs when each sequence runs what it was granted of its demand.
    pub fn of(demands: &[Demand], grants: &[usize]) -> Self {
        let mut tokens = Self::default();
        for (demand, granted) in demands.iter().zip(grants) {
            match demand {
                Demand::Decode => tokens.decode += granted,
                Demand::Prefill(_) => tokens.prefill += granted,
            }
        }
        tokens
    }
}

/// Seconds of a serving step: a fixed part (the weights are read once), and one for each token.
///
/// A step's error is shared out in proportion to what each part was expected to take. So a part is corrected by the steps in which it matters, none
/// becomes negative, and steps that are all alike leave their sum right even though they cannot tell the parts apart.
#[derive(Debug)]
pub struct Cost {
    /// Fixed, a token of a prompt, a decoded token.
    seconds: [f64; 3],
    measured: bool,
}

impl Default for Cost {
    fn default() -> Self {
        Self { seconds: ASSUMED, measured: false }
    }
}

impl Cost {
    fn parts(&self, tokens: Tokens) -> [f64; 3] {
        let [fixed, prefill, decode] = self.seconds;
        [fixed, prefill * tokens.prefill as f64, decode * tokens.decode as f64]
    }

    /// Seconds that a step is expected to take.
    pub fn step(&self, tokens: Tokens) -> f64 {
        self.parts(tokens).iter().sum()
    }

    /// Seconds of a step that do not depend on its tokens.
    pub fn fixed(&self) -> f64 {
        self.seconds[0]
    }

    /// Tokens of prompts that take `seconds`; none while nothing is known.
    pub fn prefill_within(&self, seconds: f64) -> usize {
        if self.measured { (seconds / self.seconds[1]) as usize } else { 0 }
    }

    /// A step has run.
    pub fn learn(&mut self, tokens: Tokens, seconds: f64) {
        let (parts, expected) = (self.parts(tokens), self.step(tokens));
        let ratio = seconds.max(f64::MIN_POSITIVE) / expected;
        if !std::mem::replace(&mut self.measured, true) {
            self.seconds = self.seconds.map(|known| known * ratio);
            return;
        }
        let error = ratio.min(OUTLIER) - 1.0;
        for (known, part) in self.seconds.iter_mut().zip(parts) {
            *known *= 1.0 + LEARNING * error * part / expected;
        }
    }
}

/// Seconds of a row of training work, from which a slice gets its length.
#[derive(Debug, Default)]
pub struct Pace {
    row: Option<f64>,
}

impl Pace {
    /// Rows that take about `seconds`; `least` while nothing is known, and at least.
    pub fn rows(&self, seconds: f64, least: usize) -> usize {
        self.row.map_or(least, |row| ((seconds / row) as usize).max(least))
    }

    /// Rows have run.
    pub fn learn(&mut self, rows: usize, seconds: f64) {
        let row = seconds.max(f64::MIN_POSITIVE) / rows.max(1) as f64;
        self.row = Some(self.row.map_or(row, |known| known * (1.0 + LEARNING * ((row / known).min(OUTLIER) - 1.0))));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_of_many_kinds_teach_what_each_part_costs() {
        for [fixed, prefill, decode] in [[0.008, 0.0007, 0.002], [0.5, 0.03, 0.01], [0.02, 0.00001, 0.0002]] {
            let mut cost = Cost::default();
            let truth = |tokens: Tokens| fixed + prefill * tokens.prefill as f64 + decode * tokens.decode as f64;
            for step in 0..600 {
                let tokens = Tokens { prefill: [0, 0, 600, 150][step % 4], decode: [4, 24, 0, 8][step / 4 % 4] };
                let noise = [1.0, 0.9, 1.1, 0.95, 1.05][step % 5];
                cost.learn(tokens, truth(tokens) * noise);
            }
            for tokens in [Tokens { prefill: 0, decode: 8 }, Tokens { prefill: 300, decode: 4 }, Tokens { prefill: 1000, decode: 0 }] {
                let (expected, found) = (truth(tokens), cost.step(tokens));
                assert!((found / expected - 1.0).abs() < 0.25, "{tokens:?}: {found} of {expected}");
            }
        }
    }

    #[test]
    fn one_step_that_was_held_up_is_no_measure() {
        let mut cost = Cost::default();
        let tokens = Tokens { prefill: 0, decode: 4 };
        (0..10).for_each(|_| cost.learn(tokens, 0.02));
        cost.learn(tokens, 60.0);
        assert!(cost.step(tokens) < 0.02 * 1.26);
    }

    #[test]
    fn a_slice_is_as_long_as_it_is_told_once_one_has_run() {
        let mut pace = Pace::default();
        assert_eq!(pace.rows(0.05, 32), 32);
        pace.learn(32, 0.032);
        assert_eq!(pace.rows(0.05, 32), 50);
        assert_eq!(pace.rows(0.005, 32), 32);
        (0..40).for_each(|_| pace.learn(50, 0.1));
        assert!((24..=26).contains(&pace.rows(0.05, 8)));
    }
}
