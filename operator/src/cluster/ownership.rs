//! Whose a child is, before it is written over. Pure.

use carryon_crds::names;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::{Resource, ResourceExt as _};

use super::failure::path;
use crate::shared::Refusal;

/// Who looks after an object.
pub fn controller<K: Resource>(object: &K) -> Option<&OwnerReference> {
    object.owner_references().iter().find(|owner| owner.controller == Some(true))
}

/// Refuses an object that another one controls, or that has nothing to do with us.
pub fn ours<K: Resource<DynamicType = ()>>(wanted: &K, present: &K) -> Result<(), Refusal> {
    let thing = path(present);
    let Some(controller_now) = controller(present) else {
        // Left behind by a deletion that orphans children: taken over.
        return match present.labels().get(names::MANAGER_LABEL).is_some_and(|manager| manager == names::MANAGER) {
            true => Ok(()),
            false => Err(Refusal::permanent("ChildTaken", format!("{thing} is not ours: delete it or rename this object"))),
        };
    };
    let OwnerReference { kind, name, uid, .. } = controller_now;
    match controller(wanted) {
        Some(wanted) if wanted.uid == *uid => Ok(()),
        Some(wanted) if (&wanted.kind, &wanted.name) == (kind, name) => {
            let message = format!("{thing} belongs to an earlier {kind} {name} and is still being deleted");
            Err(Refusal::waiting("ChildBeingDeleted", message))
        }
        _ => Err(Refusal::permanent("ChildTaken", format!("{thing} belongs to {kind} {name}: delete it or rename this object"))),
    }
}

/// Refuses an attempt that an earlier object of that name has left behind, when it trains something else.
pub fn same_configuration(wanted: &Job, present: &Job) -> Result<(), Refusal> {
    let digest = |job: &Job| {
        let template = job.spec.as_ref()?.template.metadata.as_ref()?;
        template.annotations.as_ref()?.get(names::CONFIG_DIGEST_ANNOTATION).cloned()
    };
    if digest(wanted) == digest(present) {
        return Ok(());
    }
    Err(Refusal::permanent("ChildTaken", format!("{} was left behind with another configuration: delete it", path(present))))
}
