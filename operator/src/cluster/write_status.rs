//! The status is written when it is news, and its transitions become events.

use carryon_crds::condition::types::{READY, STALLED};
use carryon_crds::condition::{ObservedStatus as _, is_true};
use carryon_crds::names;
use kube::api::{Patch, PatchParams};
use kube::runtime::events::{Event, EventType};
use kube::{Api, ResourceExt as _};
use serde_json::json;

use super::context::Context;
use super::failure::{Failure, code};
use super::key::Key;
use super::kinds::Reconcile;
use super::status_patch::difference;

/// What came of a status.
pub enum StatusWrite {
    /// It is written, or need not be.
    Done,
    /// The object has changed meanwhile: the change is on its way to the cache.
    Conflict,
    /// The object is deleted.
    Gone,
}

/// Writes `status` over that of `object`, if it says anything new.
///
/// # Errors
/// What is worth another try.
pub async fn write_status<K: Reconcile>(object: &K, status: &K::Status, context: &Context) -> Result<StatusWrite, Failure> {
    if object.status() == Some(status) {
        return Ok(StatusWrite::Done);
    }
    // Of this version only: a status that somebody else has changed meanwhile is seen first.
    let version = json!({ "resourceVersion": object.resource_version() });
    let patch = Patch::Merge(json!({ "metadata": version, "status": difference(object.status(), status) }));
    let api: Api<K> = Api::namespaced(context.client.clone(), &object.namespace().unwrap_or_default());
    let parameters = PatchParams { field_manager: Some(names::MANAGER.to_owned()), ..PatchParams::default() };
    match api.patch_status(&object.name_any(), &parameters, &patch).await {
        Ok(new) => {
            context.written.status(&new, object.resource_version());
            announce(object, status, context);
            Ok(StatusWrite::Done)
        }
        Err(error) if code(&error) == 404 => Ok(StatusWrite::Gone),
        Err(error) if code(&error) == 409 => Ok(StatusWrite::Conflict),
        Err(error) => {
            Err(Failure::Api { step: "write the status of", what: Key::of(K::KIND, object).to_string(), source: Box::new(error) })
        }
    }
}

/// An event for each transition of Ready: its status or its reason.
fn announce<K: Reconcile>(object: &K, status: &K::Status, context: &Context) {
    let ready = |status: &K::Status| status.conditions().iter().find(|condition| condition.type_ == READY).cloned();
    let Some(now) = ready(status) else { return };
    let before = object.status().and_then(ready);
    if before.is_some_and(|before| (&before.status, &before.reason) == (&now.status, &now.reason)) {
        return;
    }
    let stalled = is_true(status.conditions(), STALLED);
    let event = Event {
        type_: if stalled { EventType::Warning } else { EventType::Normal },
        reason: now.reason.clone(),
        note: Some(now.message.chars().take(1000).collect()),
        action: "Reconcile".to_owned(),
        secondary: None,
    };
    context.events.publish(event, object.object_ref(&()));
}
