//! Whether an object in the cluster already says all that we want it to say.

use carryon_crds::quantity;
use serde_json::Value;

/// Members by which the items of a list are told apart, as in server-side apply's list maps.
const KEYS: [&str; 5] = ["name", "mountPath", "containerPort", "port", "uid"];

/// Whether every field of `wanted` is in `present` with the same value. What others have added does not count against it;
/// quantities are compared as amounts, because the API server writes `1000m` as `1`.
pub fn covers(present: &Value, wanted: &Value) -> bool {
    covers_at("", present, wanted)
}

fn covers_at(parent: &str, present: &Value, wanted: &Value) -> bool {
    match (present, wanted) {
        (Value::Object(present), Value::Object(wanted)) => wanted.iter().all(|(key, wanted)| {
            let scope = if ["requests", "limits"].contains(&parent) { parent } else { key };
            present.get(key).is_some_and(|present| covers_at(scope, present, wanted))
        }),
        (Value::Array(present), Value::Array(wanted)) => wanted.iter().enumerate().all(|(place, wanted)| {
            let key = KEYS.into_iter().find(|key| wanted.get(key).is_some());
            let same = match key {
                Some(key) => present.iter().find(|present| present.get(key) == wanted.get(key)),
                None => present.get(place),
            };
            same.is_some_and(|present| covers_at(parent, present, wanted))
        }),
        (Value::String(present), Value::String(wanted)) if ["requests", "limits"].contains(&parent) => {
            present == wanted || quantity::value(present).is_some_and(|amount| Some(amount) == quantity::value(wanted))
        }
        _ => present == wanted,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::covers;

    #[test]
    fn what_others_add_is_theirs() {
        let present = json!({"spec": {"replicas": 3, "template": {"annotations": {"a": "1", "b": "2"}}}, "status": {}});
        assert!(covers(&present, &json!({"spec": {"template": {"annotations": {"a": "1"}}}})));
        assert!(!covers(&present, &json!({"spec": {"replicas": 2}})));
        assert!(!covers(&present, &json!({"spec": {"paused": false}})), "a field that is not there");
    }

    #[test]
    fn items_are_found_by_their_key() {
        let present = json!([{"name": "sidecar"}, {"name": "pool", "image": "a"}]);
        assert!(covers(&present, &json!([{"name": "pool", "image": "a"}])));
        assert!(!covers(&present, &json!([{"name": "pool", "image": "b"}])));
        assert!(!covers(&json!(["--a", "--b"]), &json!(["--b"])), "arguments have an order");
    }

    #[test]
    fn quantities_are_amounts() {
        let resources = |cpu: &str| json!({"resources": {"limits": {"cpu": cpu}}});
        assert!(covers(&resources("1"), &resources("1000m")));
        assert!(!covers(&resources("1"), &resources("2")));
        assert!(!covers(&json!({"value": "1"}), &json!({"value": "1000m"})), "elsewhere they are texts");
    }
}
