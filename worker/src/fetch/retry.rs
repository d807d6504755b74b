//! When and how long to wait before a source is asked again.

use std::time::Duration;

use super::error::FetchError;

/// Failures one after the other, without a byte between them, after which a source is given up.
pub const ATTEMPTS: u32 = 10;
/// Before the second attempt; it doubles from there.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
/// The longest pause of ours.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// The longest pause that a source may ask for.
const LONGEST_ASKED: Duration = Duration::from_secs(300);

/// How often something failed in a row.
#[derive(Debug, Default)]
pub struct Attempts(u32);

impl Attempts {
    /// A byte came: what failed before does not count.
    pub fn progress(&mut self) {
        self.0 = 0;
    }

    /// The pause after this failure, or the failure itself when it is final or was the last one.
    ///
    /// # Errors
    /// `error`, when asking again is no use.
    pub fn pause(&mut self, error: FetchError) -> Result<Duration, FetchError> {
        let FetchError::Unreachable { after, .. } = &error else { return Err(error) };
        self.0 += 1;
        if self.0 >= ATTEMPTS {
            return Err(error);
        }
        Ok(pause(self.0, *after))
    }
}

/// Pause after the `failure`-th failure (from 1), longer when the source asked for that.
fn pause(failure: u32, asked: Option<Duration>) -> Duration {
    let own = FIRST_PAUSE.saturating_mul(1 << (failure - 1).min(16)).min(LONGEST_PAUSE);
    // All that were cut off together do not come back together.
    let own = own.mul_f64(rand::random_range(0.75..1.25));
    own.max(asked.unwrap_or_default().min(LONGEST_ASKED))
}

/// Does `work` until it succeeds, or fails for good; `told` hears of each failure and the pause after it.
///
/// # Errors
/// The first failure that is final, or the last of [`ATTEMPTS`].
pub async fn patiently<T, F: Future<Output = Result<T, FetchError>>>(work: impl Fn() -> F) -> Result<T, FetchError> {
    let mut attempts = Attempts::default();
    loop {
        match work().await {
            Ok(value) => return Ok(value),
            Err(error) => wait(&mut attempts, error).await?,
        }
    }
}

/// Waits out a failure, saying so.
///
/// # Errors
/// As [`Attempts::pause`].
pub async fn wait(attempts: &mut Attempts, error: FetchError) -> Result<(), FetchError> {
    let words = error.to_string();
    let pause = attempts.pause(error)?;
    tracing::warn!("{words}; asking again in {:.1} s", pause.as_secs_f64());
    tokio::time::sleep(pause).await;
    Ok(())
}

/// The value of a `Retry-After` header: seconds, or a date.
pub fn retry_after(value: &str, now: jiff::Timestamp) -> Option<Duration> {
    if let Ok(seconds) = value.trim().parse::<u64>() {
        return Some(Duration::from_secs(seconds));
    }
    let date = jiff::fmt::rfc2822::DateTimeParser::new().parse_timestamp(value.trim()).ok()?;
    Some(Duration::from_secs(u64::try_from(date.as_second() - now.as_second()).unwrap_or(0)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_and_end_and_a_source_is_left_alone_as_it_asks() {
        let seconds = |failure, asked: Option<u64>| pause(failure, asked.map(Duration::from_secs)).as_secs_f64();
        assert!((0.1..0.3).contains(&seconds(1, None)));
        assert!((1.0..2.1).contains(&seconds(4, None)));
        assert!((20.0..38.0).contains(&seconds(9, None)));
        assert_eq!(seconds(1, Some(7)), 7.0);
        assert_eq!(seconds(1, Some(1 << 40)), 300.0);
    }

    #[test]
    fn only_what_may_pass_is_tried_again_and_bytes_between_failures_count() {
        let mut attempts = Attempts::default();
        for _ in 1..ATTEMPTS {
            attempts.pause(FetchError::unreachable("x", "broken")).unwrap();
        }
        attempts.progress();
        attempts.pause(FetchError::unreachable("x", "broken")).unwrap();
        assert!(attempts.pause(FetchError::Refused("no".to_owned())).is_err());
        for _ in 2..ATTEMPTS {
            attempts.pause(FetchError::unreachable("x", "broken")).unwrap();
        }
        assert!(attempts.pause(FetchError::unreachable("x", "broken")).is_err());
    }

    #[test]
    fn retry_after_is_seconds_or_a_date() {
        let now: jiff::Timestamp = "1994-11-06T08:49:07Z".parse().unwrap();
        assert_eq!(retry_after("120", now), Some(Duration::from_secs(120)));
        assert_eq!(retry_after("Sun, 06 Nov 1994 08:49:37 GMT", now), Some(Duration::from_secs(30)));
        assert_eq!(retry_after("Sun, 06 Nov 1994 08:49:00 GMT", now), Some(Duration::ZERO));
        assert_eq!(retry_after("soon", now), None);
    }
}
