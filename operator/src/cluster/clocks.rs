//! Time that goes by whatever happens to this process.
//!
//! Two clocks tell of it, and the one that is further counts: [`Instant`] stands still while the machine sleeps, and in a virtual one that is paused;
//! the wall clock goes on, or is set right afterwards, but may also be set back. One that is set forward ends a term early: it is renewed in seconds.

use std::time::{Duration, Instant, SystemTime};

/// The end of a span of time, by both clocks.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct End(Instant, SystemTime);

impl End {
    /// So long from now.
    pub fn after(span: Duration) -> Self {
        Self(Instant::now() + span, SystemTime::now() + span)
    }

    /// Whether it has come.
    pub fn has_come(self) -> bool {
        Instant::now() >= self.0 || SystemTime::now() >= self.1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_clock_that_is_further_counts() {
        let (hour, ends) = (Duration::from_secs(3600), End::after(Duration::from_secs(3600)));
        assert!(!ends.has_come());
        assert!(End(Instant::now(), ends.1).has_come(), "the process was frozen, or the wall clock set back");
        assert!(End(Instant::now() + hour, SystemTime::now()).has_come(), "the machine has slept");
    }
}
