//! What gateways say of their API keys. Nobody else reads the Secrets: the operator has no right to.

use carryon_crds::CarryOnDeployment;
use carryon_crds::deployment::{ApiKey, SecretKey};
use carryon_crds::wire::KeyState;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt as _;

use super::{Observed, Validated};
use crate::shared::Refusal;
use crate::shared::meta::Owner;
use crate::shared::rollout::is_earlier;
use crate::shared::trouble::phase;

/// The pods that are asked for the keys of `deployment`.
pub fn asked<'a>(deployment: &CarryOnDeployment, pods: &'a [Pod]) -> impl Iterator<Item = &'a Pod> + use<'a> {
    let has_keys = !deployment.spec.api.keys.is_empty();
    pods.iter().filter(move |pod| has_keys && phase(pod) == "Running")
}

/// What there is to be said of the keys, by the pods of the present configuration: remarks, though they work, or that one does not.
pub(super) fn said(gateways: &Validated, applied: &Deployment, observed: &Observed) -> Result<Vec<String>, Refusal> {
    let template = applied.spec.as_ref().map(|spec| &spec.template);
    let present = observed.pods.iter().filter(|pod| !is_earlier(pod, template));
    let states: Vec<&Vec<KeyState>> = present.filter_map(|pod| Some(&observed.said.get(&pod.name_any())?.api_keys)).collect();
    let mut remarks = Vec::new();
    for (index, key) in gateways.keys.iter().enumerate() {
        // One that a pod cannot use is worse than one that it can.
        if let Some(state) = states.iter().filter_map(|states| states.get(index)).max() {
            remarks.extend(remark(key, *state, &gateways.basis.owner)?);
        }
    }
    Ok(remarks)
}

/// Whether clients can send a key, and what is to be said of it. Of itself nothing is said.
fn remark(api_key: &ApiKey, state: KeyState, owner: &Owner) -> Result<Option<String>, Refusal> {
    let SecretKey { name, key } = &api_key.secret_ref;
    let what = format!("Secret {}/{name}", owner.namespace);
    let refuse = |reason, message: String| Err(Refusal::waiting(reason, message));
    match state {
        KeyState::Usable => Ok(None),
        KeyState::Trimmed => Ok(Some(format!("the white space around {key:?} in {what} is not part of the API key"))),
        KeyState::Empty => refuse("SecretKeyEmpty", format!("{what} holds nothing under {key:?}: give it the API key")),
        KeyState::Unusable => refuse(
            "SecretKeyUnusable",
            format!(
                "{what} holds a line break or control character within {key:?}, or too much, which no request can carry: give it one line"
            ),
        ),
        KeyState::Missing => refuse(
            "SecretKeyNotFound",
            format!("{what} (spec.api.keys[{}].secretRef) or its key {key:?} not found: create it", api_key.name),
        ),
    }
}
