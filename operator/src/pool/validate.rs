//! A pool's spec and the world, checked: everything `build` needs and nothing it has to doubt.

use carryon_crds::pool::Sharing;
use carryon_crds::wire::BaseConfig;
use carryon_crds::{BaseModelPool, BaseModelPoolSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use kube::ResourceExt as _;

use super::source::{Fetched, Model};
use super::{Observed, download, gpu};
use crate::shared::meta::Owner;
use crate::shared::pods::Basis;
use crate::shared::revision::{Rendering, Source};
use crate::shared::{Refusal, Settings, sharing};

/// A pool that can be built.
#[derive(Clone, Debug, PartialEq)]
pub struct Validated {
    /// Owner of the children, and what the pods are made from.
    pub basis: Basis,
    /// The worker's configuration.
    pub config: BaseConfig,
    /// Where the weights are.
    pub model: Model,
    /// Commit that the pods fetch, once one of them has resolved the revision.
    pub commit: Option<String>,
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
    if let Some(size) = spec.engine.tensor_parallel_size.filter(|size| *size != 1) {
        let message = format!(
            "spec.engine.tensorParallelSize is {size}: a model that is split over several GPUs is not built yet; leave it out, and give each \
             pod one GPU that holds the whole model"
        );
        return Err(Refusal::permanent("TensorParallelNotSupported", message));
    }
    let claim = spec.model.claim();
    if let Some((claim, field)) = claim.filter(|_| observed.claim.is_none()) {
        return Err(owner.lacks("ClaimNotFound", "PersistentVolumeClaim", &claim.claim_name, field));
    }
    let source = &spec.model.source;
    let here = source.persistent_volume_claim.clone().map(Model::Claim).or_else(|| source.image.clone().map(Model::Image));
    let model = here.or_else(|| Fetched::of(&spec.model).map(Box::new).map(Model::Fetched)).ok_or_else(|| {
        let sources = "huggingFace, objectStore, image or persistentVolumeClaim";
        Refusal::permanent("NoModelSource", format!("spec.model.source is empty: set {sources}"))
    })?;
    let commit = download::commit(pool, observed);
    // One pod alone resolves the revision: two might find two commits.
    let resolves = commit.is_none() && matches!(&model, Model::Fetched(fetched) if fetched.moves());
    let replicas = if resolves { spec.replicas.map(|replicas| replicas.min(1)) } else { spec.replicas };
    gpu::room(spec)?;
    let shaping = BaseModelPoolSpec { replicas: None, sharing: Sharing::default(), ..spec.clone() };
    let rendering = Rendering::of(&Source::of(pool, shaping), &observed.revisions);
    let image = rendering.image().map_or_else(|| gpu::image(spec, settings), Ok)?;
    Ok(Validated {
        config: BaseConfig { name: pool.name_any(), dtype: spec.dtype, engine: spec.engine.clone(), text_only: spec.model.text_only },
        model,
        commit,
        replicas,
        shared: sharing::selector(&spec.sharing.namespaces),
        basis: Basis { image, ..Basis::new(owner, &spec.server, rendering, settings) },
    })
}
