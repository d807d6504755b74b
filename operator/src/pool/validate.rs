//! A pool's spec and the world, checked: everything `build` needs and nothing it has to doubt.

use carryon_crds::common::ClaimPath;
use carryon_crds::pool::{ModelImage, Sharing};
use carryon_crds::wire::BaseConfig;
use carryon_crds::{BaseModelPool, BaseModelPoolSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use kube::ResourceExt as _;

use super::{Observed, gpu};
use crate::shared::meta::Owner;
use crate::shared::pods::Basis;
use crate::shared::revision::{Rendering, Source};
use crate::shared::{Refusal, Settings, sharing};

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
    /// Owner of the children, and what the pods are made from.
    pub basis: Basis,
    /// The worker's configuration.
    pub config: BaseConfig,
    /// Where the weights are.
    pub model: Model,
    /// Pods; none leaves them to an autoscaler.
    pub replicas: Option<i32>,
    /// Labels of the namespaces, beside its own, whose jobs and deployments may use it.
    pub shared: Option<LabelSelector>,
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
            return Err(owner.lacks("ClaimNotFound", "PersistentVolumeClaim", &claim.claim_name, "spec.model.source"));
        }
        (Some(claim), _) => Model::Claim(claim.clone()),
        (None, Some(image)) => Model::Image(image.clone()),
        (None, None) => return Err(Refusal::permanent("NoModelSource", "spec.model.source is empty: set persistentVolumeClaim or image")),
    };
    gpu::room(spec)?;
    let shaping = BaseModelPoolSpec { replicas: None, sharing: Sharing::default(), ..spec.clone() };
    let rendering = Rendering::of(&Source::of(pool, shaping), &observed.revisions);
    let image = rendering.image().map_or_else(|| gpu::image(spec, settings), Ok)?;
    Ok(Validated {
        config: BaseConfig { name: pool.name_any(), dtype: spec.dtype, engine: spec.engine.clone(), text_only: spec.model.text_only },
        model,
        replicas: spec.replicas,
        shared: sharing::selector(&spec.sharing.namespaces),
        basis: Basis { image, ..Basis::new(owner, &spec.server, rendering, settings) },
    })
}
