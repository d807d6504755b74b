//! When `--until complete` is reached, or cannot be any more.

use carryon_crds::condition::{find, is_true, types};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use serde_json::Value;

use super::store::{Key, Store};

/// How far a set of objects is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Every job is Complete and everything else Ready.
    Reached,
    /// Not yet; what is waited for.
    Pending(String),
    /// One needs a change by the user.
    Failed(String),
}

/// The verdict over the objects `keys`.
pub fn complete(store: &Store, keys: &[Key]) -> Verdict {
    let mut pending = None;
    for key in keys {
        let wanted = match key.kind.as_str() {
            "CarryOnJob" => types::COMPLETE,
            "BaseModelPool" | "CarryOnDeployment" => types::READY,
            _ => continue,
        };
        if let Some(problem) = store.damaged().get(key) {
            return Verdict::Failed(problem.clone());
        }
        let value = store.value(key).unwrap_or(&Value::Null);
        let conditions: Vec<Condition> = serde_json::from_value(value["status"]["conditions"].clone()).unwrap_or_default();
        let message = |type_: &str| find(&conditions, type_).map(|condition| condition.message.clone());
        if is_true(&conditions, types::STALLED) {
            return Verdict::Failed(format!("{key}: {}", message(types::STALLED).unwrap_or_default()));
        }
        if is_true(&conditions, types::SUSPENDED) {
            return Verdict::Failed(format!("{key} is suspended"));
        }
        let current = value["status"]["observedGeneration"] == value["metadata"]["generation"];
        if !current || !is_true(&conditions, wanted) {
            pending.get_or_insert_with(|| format!("{key}: {}", message(types::READY).unwrap_or_else(|| "not seen yet".to_owned())));
        }
    }
    pending.map_or(Verdict::Reached, Verdict::Pending)
}
