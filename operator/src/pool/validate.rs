//! A pool's spec and the world, checked: everything `build` needs and nothing it has to doubt.

use carryon_crds::BaseModelPool;
use carryon_crds::common::{ClaimPath, PodTemplate};
use carryon_crds::wire::BaseConfig;
use kube::ResourceExt as _;

use super::Observed;
use crate::shared::meta::Owner;
use crate::shared::{Refusal, Settings};

/// A pool that can be built.
#[derive(Clone, Debug, PartialEq)]
pub struct Validated {
    /// Owner of the children.
    pub owner: Owner,
    /// The worker's configuration.
    pub config: BaseConfig,
    /// Where the weights are.
    pub model: ClaimPath,
    /// Pods.
    pub replicas: i32,
    /// The pods' template.
    pub template: PodTemplate,
    /// Image when the template names none.
    pub image: String,
}

/// Checks a pool against the world.
///
/// # Errors
/// A [`Refusal`] that names what is missing.
pub fn validate(pool: &BaseModelPool, observed: &Observed, settings: &Settings) -> Result<Validated, Refusal> {
    let owner = Owner::of(pool, "pool");
    let spec = &pool.spec;
    let model = spec
        .model
        .source
        .persistent_volume_claim
        .clone()
        .ok_or_else(|| Refusal::permanent("NoModelSource", "spec.model.source is empty: set persistentVolumeClaim"))?;
    if observed.claim.is_none() {
        let claim = format!("{}/{}", owner.namespace, model.claim_name);
        return Err(Refusal::waiting("ClaimNotFound", format!("PersistentVolumeClaim {claim} (spec.model.source) not found: create it")));
    }
    Ok(Validated {
        config: BaseConfig { name: pool.name_any(), dtype: spec.dtype, engine: spec.engine.clone() },
        model,
        replicas: spec.replicas,
        template: spec.server.clone(),
        image: settings.pinned_image(pool.status.as_ref().and_then(|status| status.image.as_ref())),
        owner,
    })
}
