//! The difference between two statuses as a JSON patch: members that neither of them has, such as those of a newer operator, stay, in the items
//! of lists too. A merge patch could not do that: it replaces lists.

use serde::Serialize;
use serde_json::{Map, Value, json};

/// Members that tell the items of a list apart: the list-map keys of our definitions.
const KEYS: [&str; 2] = ["type", "number"];

/// What makes `old` into `new`, of an object of this version only; all of `new` where there is no old one.
pub fn difference<S: Serialize>(old: Option<&S>, new: &S, version: Option<&str>) -> Value {
    let json = |status: &S| serde_json::to_value(status).expect("a status is JSON");
    let new = json(new);
    let mut patch = vec![add("/metadata/resourceVersion", &json!(version))];
    match old.map(json) {
        Some(old) => change(&mut patch, "/status", &old, &new),
        None => patch.push(add("/status", &new)),
    }
    Value::Array(patch)
}

fn change(patch: &mut Vec<Value>, path: &str, old: &Value, new: &Value) {
    match (old, new) {
        _ if old == new => {}
        (Value::Object(old), Value::Object(new)) => members(patch, path, old, new),
        (Value::Array(old), Value::Array(new)) if in_order(old, new) => items(patch, path, old, new),
        _ => patch.push(add(path, new)),
    }
}

fn members(patch: &mut Vec<Value>, path: &str, old: &Map<String, Value>, new: &Map<String, Value>) {
    patch.extend(old.keys().filter(|member| !new.contains_key(*member)).map(|member| remove(&format!("{path}/{member}"))));
    for (member, value) in new {
        let path = format!("{path}/{member}");
        match old.get(member) {
            Some(old) => change(patch, &path, old, value),
            None => patch.push(add(&path, value)),
        }
    }
}

/// Items that go, from the last on, so that the places of the others hold; then each in its new place.
fn items(patch: &mut Vec<Value>, path: &str, old: &[Value], new: &[Value]) {
    let stays = |item: &Value| new.iter().any(|new| key(new) == key(item));
    patch.extend(old.iter().enumerate().rev().filter(|(_, item)| !stays(item)).map(|(place, _)| remove(&format!("{path}/{place}"))));
    for (place, item) in new.iter().enumerate() {
        let path = format!("{path}/{place}");
        match old.iter().find(|old| key(old) == key(item)) {
            Some(old) => change(patch, &path, old, item),
            None => patch.push(add(&path, item)),
        }
    }
}

/// Whether the items of two lists, not empty, have keys, and those that are in both come in one order.
fn in_order(old: &[Value], new: &[Value]) -> bool {
    let keys = |list: &[Value]| list.iter().map(|item| key(item).cloned()).collect::<Option<Vec<Value>>>();
    let (Some(old), Some(new)) = (keys(old), keys(new)) else { return false };
    let both = |own: &[Value], other: &[Value]| own.iter().filter(|key| other.contains(key)).cloned().collect::<Vec<_>>();
    !old.is_empty() && both(&old, &new) == both(&new, &old)
}

fn key(item: &Value) -> Option<&Value> {
    KEYS.iter().find_map(|key| item.get(key))
}

/// Of a member that is there, this is its replacement.
fn add(path: &str, value: &Value) -> Value {
    json!({ "op": "add", "path": path, "value": value })
}

fn remove(path: &str) -> Value {
    json!({ "op": "remove", "path": path })
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::difference;

    /// What an API server makes of `stored` when a status is written that knows `old` of it.
    fn written(stored: &Value, old: Option<&Value>, new: &Value) -> Value {
        let mut object = json!({ "metadata": { "resourceVersion": "7" }, "status": stored });
        if stored.is_null() {
            object.as_object_mut().unwrap().remove("status");
        }
        let patch = serde_json::from_value::<json_patch::Patch>(difference(old, new, Some("7"))).unwrap();
        json_patch::patch(&mut object, &patch).unwrap();
        object["status"].clone()
    }

    #[test]
    fn what_is_not_ours_stays_and_the_rest_is_as_wanted() {
        let old = json!({"replicas": 1, "url": "u", "image": "i", "stable": {"digest": "a", "uri": "b"}});
        let new = json!({"replicas": 2, "url": "u", "stable": {"digest": "c", "uri": "b"}, "resolved": {"digest": "c"}});
        let with_newer = |status: &Value| {
            let mut stored = status.clone();
            json_patch::merge(&mut stored, &json!({"newer": {"a": 1}, "stable": {"newer": 2}}));
            stored
        };
        assert_eq!(written(&with_newer(&old), Some(&old), &new), with_newer(&new));
        assert_eq!(written(&Value::Null, None, &new), new);
    }

    #[test]
    fn items_that_go_come_and_change_leave_what_is_not_ours_in_the_others() {
        let item = |number: u32, result: &str| json!({"number": number, "result": result});
        let newer = |number: u32, result: &str| json!({"number": number, "result": result, "newer": {"of": number}});
        let list = |items: &[Value]| json!({ "attempts": items });
        // (old and new, as we know them; what is stored; what is stored then)
        let cases = [
            (
                vec![item(1, "a"), item(2, "")],
                vec![item(1, "a"), item(2, "b"), item(3, "")],
                vec![newer(1, "a"), newer(2, "b"), item(3, "")],
            ),
            (vec![item(1, "a"), item(2, ""), item(3, "")], vec![item(2, "b"), item(4, "")], vec![newer(2, "b"), item(4, "")]),
            (vec![item(2, "a"), item(4, "a")], vec![item(1, ""), item(2, "a"), item(3, ""), item(4, "b")], {
                vec![item(1, ""), newer(2, "a"), item(3, ""), newer(4, "b")]
            }),
            (vec![item(1, "a")], vec![], vec![]),
            (vec![], vec![item(1, "a")], vec![item(1, "a")]),
            // In another order they are all new.
            (vec![item(1, "a"), item(2, "a")], vec![item(2, "a"), item(1, "a")], vec![item(2, "a"), item(1, "a")]),
        ];
        for (old, new, expected) in cases {
            let stored: Vec<Value> =
                old.iter().map(|item| newer(item["number"].as_u64().unwrap() as u32, item["result"].as_str().unwrap())).collect();
            assert_eq!(written(&list(&stored), Some(&list(&old)), &list(&new)), list(&expected), "{old:?} to {new:?}");
        }
    }
}
