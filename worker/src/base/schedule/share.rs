//! A minimum share of the time for who lets others go first.

/// Most seconds that somebody who ran too long waits for: a stall of the machine must not count as work for minutes.
const MOST_DEBT: f64 = 1.0;

/// The account of one claimant. It is owed time for what others run while it waits.
#[derive(Debug)]
pub struct Share {
    /// Seconds owed for each second of the others.
    ratio: f64,
    owed: f64,
}

impl Share {
    /// `minimum` of the time, between 0 and 1.
    pub fn new(minimum: f64) -> Self {
        Self { ratio: minimum / (1.0 - minimum), owed: 0.0 }
    }

    /// What `seconds` of the others are worth.
    pub fn part_of(&self, seconds: f64) -> f64 {
        seconds * self.ratio
    }

    /// Seconds that are owed; below 0 when the claimant ran longer than its share.
    pub fn owed(&self) -> f64 {
        self.owed
    }

    /// Others ran while the claimant waited.
    pub fn wait(&mut self, seconds: f64) {
        self.owed += self.part_of(seconds);
    }

    /// The claimant ran. Time for which nobody else asked pays what is owed, and costs nothing more.
    pub fn run(&mut self, seconds: f64, asked_for: bool) {
        let least = if asked_for { -MOST_DEBT } else { 0.0 };
        self.owed = (self.owed - seconds).max(least);
    }

    /// The claimant has nothing to run.
    pub fn reset(&mut self) {
        self.owed = 0.0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_owed_is_the_share_of_what_both_run() {
        let mut share = Share::new(0.25);
        share.wait(3.0);
        assert!((share.owed() - 1.0).abs() < 1e-9);
        share.run(0.75, true);
        assert!((share.owed() - 0.25).abs() < 1e-9);
        share.run(0.5, true);
        assert!((share.owed() + 0.25).abs() < 1e-9, "it ran too long");
        share.run(100.0, true);
        assert_eq!(share.owed(), -MOST_DEBT);
        share.run(1.0, false);
        assert_eq!(share.owed(), 0.0, "time for which nobody asked");
    }
}
