//! How the labels of a split are spread. Pure.

use serde::{Deserialize, Serialize};

use super::sample::Target;

/// What was counted.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Balance {
    /// Samples that have each label; labels behind the last that occurs are left out.
    pub samples: Vec<u64>,
    /// Numbers, as labels of a regression.
    numbers: u64,
    /// Their mean.
    mean: f64,
    /// Sum of their squared distances from the mean.
    squares: f64,
}

impl Balance {
    /// One more sample.
    pub fn count(&mut self, target: &Target) {
        match target {
            Target::Tokens(_) | Target::Part(_) | Target::Answer(..) => {}
            Target::Label(label) => self.has(*label),
            Target::Labels(labels) => labels.iter().for_each(|label| self.has(*label)),
            Target::Value(value) => {
                // B. P. Welford's way (1962): no digits are lost to a large mean.
                self.numbers += 1;
                let before = value - self.mean;
                self.mean += before / self.numbers as f64;
                self.squares += before * (value - self.mean);
            }
        }
    }

    fn has(&mut self, label: u32) {
        let label = label as usize;
        self.samples.resize(self.samples.len().max(label + 1), 0);
        self.samples[label] += 1;
    }

    /// Mean and standard deviation of the numbers: what a regression is learned in units of. Of equal numbers the unit is 1.
    pub fn scale(&self) -> (f64, f64) {
        let deviation = (self.squares / self.numbers.max(1) as f64).sqrt();
        (self.mean, if deviation > 0.0 { deviation } else { 1.0 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_mean_and_deviation_whatever_their_size() {
        let mut balance = Balance::default();
        [1e9 + 1.0, 1e9 + 2.0, 1e9 + 3.0, 1e9 + 6.0].iter().for_each(|value| balance.count(&Target::Value(*value)));
        assert_eq!(balance.scale(), (1e9 + 3.0, 3.5f64.sqrt()));
        let mut equal = Balance::default();
        (0..3).for_each(|_| equal.count(&Target::Value(7.0)));
        assert_eq!(equal.scale(), (7.0, 1.0));
    }

    #[test]
    fn a_sample_counts_for_each_of_its_labels() {
        let mut balance = Balance::default();
        [vec![0, 3], vec![], vec![3]].into_iter().for_each(|labels| balance.count(&Target::Labels(labels)));
        assert_eq!(balance.samples, [1, 0, 0, 2]);
    }
}
