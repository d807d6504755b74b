//! Learning rate as a pure function of the step.

use std::f64::consts::PI;

/// Linear warm-up, then a cosine from 1 to `min_ratio` over `total` steps.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Schedule {
    /// Steps until the warm-up reaches 1; 0 for none.
    pub warmup: u64,
    /// Steps of the whole run.
    pub total: u64,
    /// What remains at the end, 0 to 1.
    pub min_ratio: f64,
}

impl Schedule {
    /// What learning rates are multiplied by at `step`, counted from 0.
    pub fn factor(&self, step: u64) -> f64 {
        let warmup = if self.warmup == 0 { 1.0 } else { ((step + 1) as f64 / self.warmup as f64).min(1.0) };
        let progress = if self.total == 0 { 1.0 } else { (step as f64 / self.total as f64).min(1.0) };
        warmup * (0.5 * (1.0 - self.min_ratio) * (1.0 + (PI * progress).cos()) + self.min_ratio)
    }
}

#[cfg(test)]
mod tests {
    use super::Schedule;

    /// `min(1, (i + 1) / 10) * (0.45 * (1 + cos(pi * i / 375)) + 0.1)`, in Python.
    #[test]
    fn follows_the_recipe() {
        let schedule = Schedule { warmup: 10, total: 375, min_ratio: 0.1 };
        for (step, expected) in [(0, 0.1), (9, 0.998_721_505_117_276_2), (187, 0.551_884_950_079_931_8), (374, 0.100_015_791_274_683_73)] {
            assert!((schedule.factor(step) - expected).abs() < 1e-12, "step {step}: {}", schedule.factor(step));
        }
    }

    #[test]
    fn needs_no_warm_up_and_no_steps() {
        assert_eq!(Schedule { warmup: 0, total: 10, min_ratio: 0.0 }.factor(0), 1.0);
        assert_eq!(Schedule { warmup: 0, total: 0, min_ratio: 0.5 }.factor(3), 0.5);
    }
}
