//! Back-off until a deadline.

use std::time::{Duration, Instant};

use super::{ClientError, PoolClient};

/// First pause of the back-off; it doubles up to [`LONGEST_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// What is left of a client's patience with one call. It counts from the first failure: what goes on for hours has not been waited for.
pub(super) struct Patience<'a> {
    client: &'a PoolClient,
    deadline: Option<Instant>,
    pause: Duration,
}

impl<'a> Patience<'a> {
    pub fn new(client: &'a PoolClient) -> Self {
        Self { client, deadline: None, pause: FIRST_PAUSE }
    }

    /// Waits a while after a failure that may pass; any other, or one at the deadline, is returned.
    pub async fn wait(&mut self, error: ClientError) -> Result<(), ClientError> {
        let deadline = *self.deadline.get_or_insert_with(|| Instant::now() + self.client.patience);
        if !error.is_transient() || Instant::now() + self.pause >= deadline {
            return Err(error);
        }
        if self.pause >= LONGEST_PAUSE {
            tracing::warn!("{error}; trying again");
        }
        self.client.resolver.forget();
        tokio::time::sleep(self.pause).await;
        self.pause = (self.pause * 2).min(LONGEST_PAUSE);
        Ok(())
    }
}
