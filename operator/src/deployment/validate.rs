//! A deployment's spec and the world, checked.

use std::collections::BTreeSet;

use carryon_crds::deployment::{ApiKey, SecretKey};
use carryon_crds::wire::{ServeConfig, ServeHead};
use carryon_crds::{CarryOnDeployment, CarryOnDeploymentSpec};
use kube::ResourceExt as _;

use super::Observed;
use super::heads::{Entry, entries};
use crate::shared::meta::Owner;
use crate::shared::pods::Basis;
use crate::shared::revision::{Rendering, Source};
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
    /// Name of the pool.
    pub pool: String,
    /// API keys.
    pub keys: Vec<ApiKey>,
    /// What their owners should know of the keys, though they work.
    pub key_remarks: Vec<String>,
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
    let heads = entries(deployment, observed, &owner)?;
    let pool = pool(deployment, observed, &owner)?;
    let remarks = spec.api.keys.iter().map(|key| secret(key, observed, &owner)).collect::<Result<Vec<_>, _>>()?;
    let config = config(deployment, &heads)?;
    // Of the heads, what pods see of them.
    let seen = |entry: &Entry| entry.served.as_ref().map(|served| (served.head.digest.clone(), served.head.uri.clone()));
    let seen: Vec<_> = heads.iter().map(seen).collect();
    let shaping = (CarryOnDeploymentSpec { replicas: None, ..spec.clone() }, seen);
    let rendering = Rendering::of(&Source::of(deployment, shaping), &observed.revisions);
    Ok(Validated {
        config,
        heads,
        pool,
        keys: spec.api.keys.clone(),
        key_remarks: remarks.into_iter().flatten().collect(),
        replicas: spec.replicas,
        basis: Basis::new(owner, &spec.gateway, rendering, settings),
    })
}

fn pool(deployment: &CarryOnDeployment, observed: &Observed, owner: &Owner) -> Result<String, Refusal> {
    let name = deployment.spec.pools.first().map(|pool| pool.name.clone()).unwrap_or_default();
    match observed.pool {
        Some(_) => Ok(name),
        None => Err(owner.lacks("PoolNotFound", "BaseModelPool", &name, "spec.pools[0]")),
    }
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
    Ok(ServeConfig { heads: heads.collect(), allowed_origins: deployment.spec.api.allowed_origins.clone(), base_model_name })
}

/// Whether clients can send the API key that the Secret holds, and what is to be said of it. Of itself nothing is said.
fn secret(api_key: &ApiKey, observed: &Observed, owner: &Owner) -> Result<Option<String>, Refusal> {
    let SecretKey { name, key } = &api_key.secret_ref;
    let lacks = || owner.lacks("SecretNotFound", "Secret", name, &format!("spec.api.keys[{}].secretRef", api_key.name));
    let secret = observed.secrets.iter().find(|secret| secret.name_any() == *name).ok_or_else(lacks)?;
    let what = format!("Secret {}/{name}", owner.namespace);
    let Some(value) = secret.data.as_ref().and_then(|data| data.get(key)) else {
        return Err(Refusal::waiting("SecretKeyNotFound", format!("{what} has no key {key:?}: add it")));
    };
    match value.0.trim_ascii() {
        [] => Err(Refusal::waiting("SecretKeyEmpty", format!("{what} holds nothing under {key:?}: give it the API key"))),
        sent if sent.iter().any(u8::is_ascii_control) => {
            let message =
                format!("{what} holds a line break or control character within {key:?}, which no request can carry: give it one line");
            Err(Refusal::waiting("SecretKeyUnusable", message))
        }
        sent if sent.len() < value.0.len() => Ok(Some(format!("the white space around {key:?} in {what} is not part of the API key"))),
        _ => Ok(None),
    }
}
