//! One operator of several works: the one that holds the Lease. Who loses it ends at once and starts anew as a follower.

use std::sync::Arc;

use anyhow::{Context as _, anyhow};
use carryon_crds::names;
use kube::Client;
use kube_lease_manager::{LeaseManager, LeaseManagerBuilder};

use super::RunArgs;

/// Seconds a Lease is good for after its last renewal, and seconds before that at which it is renewed.
const DURATION_SECONDS: u64 = 15;
const GRACE_SECONDS: u64 = 5;

/// This operator's part in the election; without a Lease it is always elected.
#[derive(Clone)]
pub struct Leader(Option<Arc<LeaseManager>>);

impl Leader {
    /// Takes part in the election, when the arguments name a Lease.
    ///
    /// # Errors
    /// When the Lease cannot be read or made.
    pub async fn new(client: Client, args: &RunArgs) -> anyhow::Result<Self> {
        let Some(namespace) = &args.lease_namespace else { return Ok(Self(None)) };
        let manager = LeaseManagerBuilder::new(client, &args.lease_name)
            .with_namespace(namespace)
            .with_identity(&args.identity)
            .with_duration(DURATION_SECONDS)
            .with_grace(GRACE_SECONDS)
            .with_field_manager(names::MANAGER)
            .build()
            .await
            .with_context(|| format!("failed to take part in the election by Lease {namespace}/{}", args.lease_name))?;
        Ok(Self(Some(Arc::new(manager))))
    }

    /// Returns when this operator is elected.
    ///
    /// # Errors
    /// When the Lease cannot be written.
    pub async fn elected(&self) -> anyhow::Result<()> {
        let Some(manager) = &self.0 else { return Ok(()) };
        while !manager.changed().await.context("the election has failed")? {}
        Ok(())
    }

    /// Keeps the Lease; returns when it is lost.
    pub async fn lost(&self) -> anyhow::Error {
        let Some(manager) = &self.0 else { return std::future::pending().await };
        loop {
            match manager.changed().await {
                Ok(true) => {}
                Ok(false) => return anyhow!("the Lease is lost: another operator works now"),
                Err(error) => return anyhow!("the Lease cannot be renewed: {error}"),
            }
        }
    }

    /// Gives the Lease back, so that another operator need not wait for its end.
    pub async fn release(&self) {
        if let Some(manager) = &self.0
            && let Err(error) = manager.release().await
        {
            tracing::warn!(%error, "failed to release the Lease");
        }
    }
}
