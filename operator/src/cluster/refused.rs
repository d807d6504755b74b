//! Why a workload has fewer pods than it wants. A StatefulSet and a batch Job have no condition for that: their controllers tell of it in events only.

use k8s_openapi::api::core::v1::Event;
use k8s_openapi::jiff::Timestamp;
use kube::api::ListParams;
use kube::{Api, Client, ResourceExt as _};

use super::apply::Child;
use crate::shared::rollout::FAILED_CREATE;

/// Events of one workload that are read at most.
const EVENTS: u32 = 100;

/// What the API server said of the pod of `workload` that it refused last; none when it has taken one since, or does not show its events.
pub async fn refused<K: Child>(workload: &K, client: &Client) -> Option<String> {
    let fields = format!("involvedObject.uid={}", workload.uid()?);
    let events: Api<Event> = Api::namespaced(client.clone(), &workload.namespace()?);
    let found = events.list(&ListParams::default().fields(&fields).limit(EVENTS)).await;
    last_refusal(&found.inspect_err(|error| tracing::debug!(%error, "failed to list events")).ok()?.items)
}

fn last_refusal(events: &[Event]) -> Option<String> {
    let made = |event: &Event| event.reason.as_deref() == Some("SuccessfulCreate");
    let failed = |event: &Event| event.reason.as_deref() == Some(FAILED_CREATE);
    // Of the same second, the better news are the newer: who was refused asks again.
    let last = events.iter().filter(|event| made(event) || failed(event)).max_by_key(|event| (at(event), made(event)))?;
    last.message.clone().filter(|_| failed(last))
}

fn at(event: &Event) -> Option<Timestamp> {
    event.last_timestamp.as_ref().map(|time| time.0).or_else(|| event.event_time.as_ref().map(|time| time.0))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn event(reason: &str, second: u32) -> Event {
        let value = json!({ "metadata": {}, "involvedObject": {}, "reason": reason, "message": format!("{reason} at {second}"),
            "lastTimestamp": format!("2026-01-01T00:00:{second:02}Z") });
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn the_last_word_on_creation_counts() {
        assert_eq!(last_refusal(&[]), None);
        let refused = [event("SuccessfulCreate", 1), event("FailedCreate", 3), event("FailedCreate", 2), event("Scheduled", 9)];
        assert_eq!(last_refusal(&refused).as_deref(), Some("FailedCreate at 3"));
        assert_eq!(last_refusal(&[event("FailedCreate", 3), event("SuccessfulCreate", 3)]), None);
    }
}
