//! What several test files need.
#![allow(dead_code, missing_docs, clippy::unwrap_used)]

pub mod scene;

use std::path::PathBuf;
use std::sync::LazyLock;

use carryon_operator::admission::Admission;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use serde::de::DeserializeOwned;
use serde::{Deserialize as _, Serialize};
use serde_json::Value;

/// Reading the definitions takes longer than all else.
static ADMISSION: LazyLock<Admission> = LazyLock::new(|| Admission::new().unwrap());

pub fn repository() -> PathBuf {
    PathBuf::from("..")
}

/// The first document of a manifest, with defaults, uid and generation as an API server gives them.
pub fn example<K: DeserializeOwned>(file: &str) -> K {
    let value = ADMISSION.admit(&raw(file), None).unwrap();
    serde_json::from_value(patched(value, &serde_json::json!({"metadata": {"namespace": "default", "uid": "u-1", "generation": 1}})))
        .unwrap()
}

pub fn raw(file: &str) -> Value {
    let path = repository().join("examples").join(file);
    let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let document = serde_yaml::Deserializer::from_str(&text).next().unwrap();
    Value::deserialize(document).unwrap()
}

/// JSON merge patch.
pub fn patched(mut value: Value, patch: &Value) -> Value {
    json_patch::merge(&mut value, patch);
    value
}

/// `object` with a merge patch.
pub fn with<K: Serialize + DeserializeOwned>(object: &K, patch: Value) -> K {
    serde_json::from_value(patched(serde_json::to_value(object).unwrap(), &patch)).unwrap()
}

pub fn at(second: i64) -> Time {
    Time(k8s_openapi::jiff::Timestamp::from_second(1_700_000_000 + second).unwrap())
}

/// Conditions that are told first, or are no word on where an object stands.
const FURTHER: [&str; 5] = ["Ready", "Reconciling", "Stalled", "Available", "MemoryPlanned"];

/// `Ready=False Reconciling=True Stalled=False PoolNotFound: message`, other conditions by name when True.
pub fn summary(conditions: &[Condition]) -> String {
    let of = |type_: &str| conditions.iter().find(|condition| condition.type_ == type_).unwrap_or_else(|| panic!("no condition {type_}"));
    let standing: Vec<&str> = ["Ready", "Reconciling", "Stalled"].into_iter().filter(|type_| of(type_).status == "True").collect();
    let others = conditions.iter().filter(|condition| !FURTHER.contains(&condition.type_.as_str()));
    let all: Vec<&str> = standing.into_iter().chain(others.map(|condition| condition.type_.as_str())).collect();
    format!("{} {}: {}", all.join("+"), of("Ready").reason, of("Ready").message)
}
