//! A deployment's spec and the world, checked.

use std::collections::BTreeSet;

use carryon_crds::deployment::ApiKey;
use carryon_crds::wire::{ServeConfig, ServeHead};
use carryon_crds::{CarryOnDeployment, CarryOnDeploymentSpec};
use kube::ResourceExt as _;

use super::Observed;
use super::heads::{Entry, entries};
use crate::shared::meta::Owner;
use crate::shared::pods::Basis;
use crate::shared::revision::{Rendering, Source};
use crate::shared::sharing::PoolPath;
use crate::shared::{Refusal, Settings};

/// A deployment that can be built.
#[derive(Clone, Debug, PartialEq)]
pub struct Validated {
    /// Owner of the children, and what the pods are made from.
    pub basis: Basis,
    /// The worker's configuration.
    pub config: ServeConfig,
    /// The heads, in the order of the spec.
    pub heads: Vec<Entry>,
    /// The pools, at least one.
    pub pools: Vec<PoolPath>,
    /// API keys.
    pub keys: Vec<ApiKey>,
    /// Gateway pods; none leaves them to an autoscaler.
    pub replicas: Option<i32>,
}

/// Checks a deployment against the world.
///
/// # Errors
/// A [`Refusal`] that names what is missing or wrong.
pub fn validate(deployment: &CarryOnDeployment, observed: &Observed, settings: &Settings) -> Result<Validated, Refusal> {
    let owner = Owner::of(deployment, "gateway");
    let spec = &deployment.spec;
    let pools = observed.pools(deployment);
    pools.iter().find_map(|(path, pool)| path.withheld(*pool)).map_or(Ok(()), Err)?;
    let heads = entries(deployment, observed, &owner)?;
    pools.iter().find(|(_, pool)| pool.is_none()).map_or(Ok(()), |(path, _)| Err(path.lacks()))?;
    let config = config(deployment, &heads)?;
    // Of the heads, what pods see of them.
    let seen = |entry: &Entry| entry.served.as_ref().map(|served| (served.head.digest.clone(), served.head.uri.clone()));
    let seen: Vec<_> = heads.iter().map(seen).collect();
    let shaping = (CarryOnDeploymentSpec { replicas: None, ..spec.clone() }, seen);
    let rendering = Rendering::of(&Source::of(deployment, shaping), &observed.revisions);
    Ok(Validated {
        config,
        heads,
        pools: pools.into_iter().map(|(path, _)| path).collect(),
        keys: spec.api.keys.clone(),
        replicas: spec.replicas,
        basis: Basis::new(owner, &spec.gateway, rendering, settings),
    })
}

/// The models of the endpoint.
fn config(deployment: &CarryOnDeployment, heads: &[Entry]) -> Result<ServeConfig, Refusal> {
    let base_model_name = format!("{}-base", deployment.name_any());
    let mut names = BTreeSet::from([base_model_name.as_str()]);
    if let Some(taken) = heads.iter().find(|entry| !names.insert(&entry.model_name)) {
        let message = format!("spec.heads[{}]: another model of the endpoint is called {:?} too", taken.name, taken.model_name);
        return Err(Refusal::permanent("ModelNameTaken", message));
    }
    let served = heads.iter().filter_map(|entry| Some((entry, entry.served.as_ref()?)));
    let heads = served.map(|(entry, served)| ServeHead {
        name: entry.name.clone(),
        served_model_name: entry.model_name.clone(),
        digest: served.head.digest.clone(),
    });
    let (namespace, allowed_origins) = (deployment.namespace().unwrap_or_default(), deployment.spec.api.allowed_origins.clone());
    Ok(ServeConfig { heads: heads.collect(), allowed_origins, base_model_name, namespace })
}
