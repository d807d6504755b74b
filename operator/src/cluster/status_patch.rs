//! The difference between two statuses as a merge patch: members that neither of them has, such as those of a newer operator, stay.

use serde::Serialize;
use serde_json::{Map, Value};

/// What makes `old` into `new`; all of `new` where there is no old one.
pub fn difference<S: Serialize>(old: Option<&S>, new: &S) -> Value {
    let json = |status: &S| serde_json::to_value(status).expect("a status is JSON");
    let new = json(new);
    old.map_or_else(|| new.clone(), |old| members(&json(old), &new))
}

fn members(old: &Value, new: &Value) -> Value {
    let (Value::Object(old), Value::Object(new)) = (old, new) else { return new.clone() };
    let gone = old.keys().filter(|key| !new.contains_key(*key)).map(|key| (key.clone(), Value::Null));
    let changed = new.iter().filter(|(key, value)| old.get(*key) != Some(*value)).map(|(key, value)| {
        let value = old.get(key).map_or_else(|| value.clone(), |old| members(old, value));
        (key.clone(), value)
    });
    Value::Object(gone.chain(changed).collect::<Map<_, _>>())
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::difference;

    #[test]
    fn what_is_not_ours_stays_and_the_rest_is_as_wanted() {
        let old = json!({"replicas": 1, "url": "u", "image": "i", "stable": {"digest": "a", "uri": "b"}, "conditions": [1, 2]});
        let new = json!({"replicas": 2, "url": "u", "stable": {"digest": "c", "uri": "b"}, "conditions": [2], "resolved": {"digest": "c"}});
        let patch = difference(Some(&old), &new);
        let expected = json!({"replicas": 2, "image": null, "stable": {"digest": "c"}, "conditions": [2], "resolved": {"digest": "c"}});
        assert_eq!(patch, expected);
        let stored = |status: &Value| {
            let mut stored = status.clone();
            json_patch::merge(&mut stored, &json!({"newer": {"a": 1}, "stable": {"newer": 2}}));
            stored
        };
        let mut merged = stored(&old);
        json_patch::merge(&mut merged, &patch);
        assert_eq!(merged, stored(&new));
        assert_eq!(difference(None, &new), new);
    }
}
