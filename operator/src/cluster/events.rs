//! Events of transitions. They are written beside the reconciles, one after another and no faster than a pace, so that a thousand objects that
//! change at once have their children first and their events a moment later.

use std::time::Duration;

use k8s_openapi::api::core::v1::ObjectReference;
use kube::runtime::events::{Event, Recorder};
use tokio::sync::mpsc::{self, Receiver, Sender};

/// From one event to the next at least: 20 a second.
const PACE: Duration = Duration::from_millis(50);
/// Events that wait; more are not written.
const CAPACITY: usize = 4096;

/// Where transitions are told.
pub struct Events(Sender<(Event, ObjectReference)>);

/// Events that are still to be written.
pub struct Pending(Receiver<(Event, ObjectReference)>);

/// Nothing has happened yet.
pub fn channel() -> (Events, Pending) {
    let (sender, receiver) = mpsc::channel(CAPACITY);
    (Events(sender), Pending(receiver))
}

impl Events {
    /// Tells of `event` at `object`, sooner or later.
    pub fn publish(&self, event: Event, object: ObjectReference) {
        if let Err(error) = self.0.try_send((event, object)) {
            tracing::warn!("an event is not written: {error}");
        }
    }
}

impl Pending {
    /// Writes the events as they come, as long as somebody may tell of one.
    pub async fn write(mut self, recorder: Recorder) {
        while let Some((event, object)) = self.0.recv().await {
            if let Err(error) = recorder.publish(&event, &object).await {
                let path = [&object.kind, &object.namespace, &object.name].map(|part| part.as_deref().unwrap_or_default());
                tracing::warn!(%error, object = format!("{} {}/{}", path[0], path[1], path[2]), "failed to write an event");
            }
            tokio::time::sleep(PACE).await;
        }
    }
}
