//! The status is written when it is news, and its transitions become events.

use carryon_crds::condition::types::{READY, STALLED};
use carryon_crds::condition::{ObservedStatus as _, find, is_true};
use carryon_crds::names;
use kube::api::{Patch, PatchParams};
use kube::runtime::events::{Event, EventType};
use kube::{Api, ResourceExt as _};

use super::context::Context;
use super::failure::{Failure, code, path};
use super::kinds::Reconcile;
use super::status_patch::difference;

/// Longest note of an event that an API server takes, in bytes.
const NOTE: usize = 1024;

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
pub async fn write_status<K: Reconcile>(object: &K, status: &K::Status, context: &Context) -> Result<StatusWrite, Failure> {
    if object.status() == Some(status) {
        return Ok(StatusWrite::Done);
    }
    // Of this version only: a status that somebody else has changed meanwhile is seen first.
    let patch = difference(object.status(), status, object.resource_version().as_deref());
    let patch = Patch::<()>::Json(serde_json::from_value(patch).expect("a difference is a JSON patch"));
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
        Err(error) => Err(Failure::of("write the status of", path(object))(error)),
    }
}

/// An event for each transition of Ready: its status or its reason.
fn announce<K: Reconcile>(object: &K, status: &K::Status, context: &Context) {
    let ready = |status: &K::Status| find(status.conditions(), READY).cloned();
    let Some(now) = ready(status) else { return };
    let before = object.status().and_then(ready);
    if before.is_some_and(|before| (&before.status, &before.reason) == (&now.status, &now.reason)) {
        return;
    }
    let stalled = is_true(status.conditions(), STALLED);
    let event = Event {
        type_: if stalled { EventType::Warning } else { EventType::Normal },
        reason: now.reason.clone(),
        note: Some(note(&now.message).to_owned()),
        action: "Reconcile".to_owned(),
        secondary: None,
    };
    context.events.publish(event, object.object_ref(&()));
}

fn note(message: &str) -> &str {
    &message[..message.floor_char_boundary(NOTE)]
}

#[cfg(test)]
mod tests {
    use super::note;

    #[test]
    fn a_note_is_bounded_in_bytes_and_cuts_no_character() {
        let message = "größer… ".repeat(200);
        let cut = note(&message);
        assert!((1020..=1024).contains(&cut.len()) && message.starts_with(cut));
        assert_eq!(note("short"), "short");
    }
}
