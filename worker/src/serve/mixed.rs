//! The pools beside the first one, for heads that read several bases.

use carryon_crds::wire::ModelDescription;

use super::ServeError;
use super::gateway::{START_PATIENCE, patiently};
use super::models::{Head, Models};
use crate::exchange::PoolClient;

/// A pool beside the first one.
pub(super) struct OtherPool {
    model: ModelDescription,
    client: PoolClient,
}

/// The pools beside the first one, in the order of `--other-pool`.
pub(super) struct OtherPools(Vec<OtherPool>);

impl OtherPools {
    /// Waits for the pools behind `urls`, and verifies that they run the further bases of every head that reads several.
    pub(super) async fn connect(
        urls: &[String],
        models: &Models,
        namespace: &str,
        patience: std::time::Duration,
    ) -> Result<Self, ServeError> {
        let mut pools = Vec::with_capacity(urls.len());
        for url in urls {
            let asking = PoolClient::connect(std::slice::from_ref(url), START_PATIENCE)?;
            let model = patiently(|| asking.describe()).await?;
            let client = PoolClient::connect(std::slice::from_ref(url), patience)?.bound_to(&model.identity, None).speaking_for(namespace);
            pools.push(OtherPool { model, client });
        }
        models.heads().try_for_each(|head| fits(head, pools.iter().map(|pool| &pool.model)))?;
        Ok(Self(pools))
    }

    /// Longest sequence that all of them take.
    pub(super) fn max_model_len(&self) -> Option<u32> {
        self.0.iter().map(|pool| pool.model.limits.max_model_len).min()
    }

    /// Their clients.
    pub(super) fn clients(&self) -> Vec<&PoolClient> {
        self.0.iter().map(|pool| &pool.client).collect()
    }
}

/// Refuses a head whose further bases are not those of the pools.
fn fits<'a>(head: &Head, pools: impl ExactSizeIterator<Item = &'a ModelDescription>) -> Result<(), ServeError> {
    let (others, found) = (&head.artifact.base.others, pools.len());
    if others.is_empty() && head.artifact.shape.others.is_empty() {
        return Ok(());
    }
    if others.len() != found || head.artifact.shape.others.len() != found {
        return Err(ServeError::OtherPools { head: head.name.clone(), trained_on: others.len(), found });
    }
    for (base, model) in others.iter().zip(pools) {
        if let Some(member) = base.identity.difference(&model.identity) {
            let (head, trained_on, pool) = (head.name.clone(), base.name.clone(), model.name.clone());
            return Err(ServeError::Identity { head, member, trained_on, pool });
        }
    }
    Ok(())
}
