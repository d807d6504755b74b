//! A pool's spec and the world, checked: everything `build` needs and nothing it has to doubt.

use carryon_crds::common::{ClaimPath, PodTemplate};
use carryon_crds::pool::ModelImage;
use carryon_crds::wire::BaseConfig;
use carryon_crds::{BaseModelPool, BaseModelPoolSpec};
use kube::ResourceExt as _;

use super::Observed;
use crate::shared::meta::Owner;
use crate::shared::revision::{Rendering, Source};
use crate::shared::{Refusal, Settings};

/// Where the weights are.
#[derive(Clone, Debug, PartialEq)]
pub enum Model {
    /// In a claim that exists.
    Claim(ClaimPath),
    /// In an image.
    Image(ModelImage),
}

/// A pool that can be built.
#[derive(Clone, Debug, PartialEq)]
pub struct Validated {
    /// Owner of the children.
    pub owner: Owner,
    /// The worker's configuration.
    pub config: BaseConfig,
    /// Where the weights are.
    pub model: Model,
    /// Pods.
    pub replicas: i32,
    /// The pods' template.
    pub template: PodTemplate,
    /// Image when the template names none.
    pub image: String,
    /// User of the pods; none where the cluster picks one.
    pub user: Option<i64>,
    /// Whether the pods stay what they were rendered as.
    pub rendering: Rendering,
}

/// Checks a pool against the world.
///
/// # Errors
/// A [`Refusal`] that names what is missing.
pub fn validate(pool: &BaseModelPool, observed: &Observed, settings: &Settings) -> Result<Validated, Refusal> {
    let owner = Owner::of(pool, "pool");
    let spec = &pool.spec;
    let model = match (&spec.model.source.persistent_volume_claim, &spec.model.source.image) {
        (Some(claim), _) if observed.claim.is_none() => {
            let claim = format!("{}/{}", owner.namespace, claim.claim_name);
            let message = format!("PersistentVolumeClaim {claim} (spec.model.source) not found: create it");
            return Err(Refusal::waiting("ClaimNotFound", message));
        }
        (Some(claim), _) => Model::Claim(claim.clone()),
        (None, Some(image)) => Model::Image(image.clone()),
        (None, None) => return Err(Refusal::permanent("NoModelSource", "spec.model.source is empty: set persistentVolumeClaim or image")),
    };
    let rendering = Rendering::of(&Source::of(pool, BaseModelPoolSpec { replicas: 0, ..spec.clone() }), &observed.revisions);
    Ok(Validated {
        config: BaseConfig { name: pool.name_any(), dtype: spec.dtype, engine: spec.engine.clone() },
        model,
        replicas: spec.replicas,
        template: spec.server.clone(),
        user: settings.pod_user,
        image: rendering.image(settings),
        rendering,
        owner,
    })
}
