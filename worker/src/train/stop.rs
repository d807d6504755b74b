//! The wish to stop: SIGTERM or SIGINT, raced against every wait for the pool.

use std::future::Future;

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use crate::train::error::TrainError;

/// Cheap to clone; once set it stays set.
#[derive(Clone, Debug)]
pub struct Stop {
    sender: std::sync::Arc<watch::Sender<bool>>,
}

impl Default for Stop {
    fn default() -> Self {
        Self { sender: std::sync::Arc::new(watch::Sender::new(false)) }
    }
}

impl Stop {
    /// Lets SIGTERM and SIGINT set it. Needs a Tokio runtime around it, and works as long as that runs.
    pub fn set_on_signals(&self) -> std::io::Result<()> {
        let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        let wish = self.clone();
        tokio::spawn(async move {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            wish.set();
        });
        Ok(())
    }

    /// Asks to stop.
    pub fn set(&self) {
        self.sender.send_replace(true);
    }

    /// Whether someone asked.
    pub fn is_set(&self) -> bool {
        *self.sender.borrow()
    }

    /// An error as soon as someone asked, for work that waits for nothing.
    pub fn check(&self) -> Result<(), TrainError> {
        if self.is_set() { Err(TrainError::Stopped { step: 0 }) } else { Ok(()) }
    }

    /// The future's output, or None as soon as someone asks to stop.
    pub async fn race<T>(&self, future: impl Future<Output = T>) -> Option<T> {
        let mut wish = self.sender.subscribe();
        tokio::select! {
            biased;
            // The sender lives as long as `self`, so waiting cannot fail.
            _ = wish.wait_for(|set| *set) => None,
            output = future => Some(output),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_wait_ends_when_asked_to_stop() {
        let stop = Stop::default();
        assert_eq!(stop.race(async { 3 }).await, Some(3));
        let other = stop.clone();
        let wait = stop.race(std::future::pending::<()>());
        let (ended, ()) = tokio::join!(wait, async { other.set() });
        assert!(ended.is_none() && stop.is_set());
    }
}
