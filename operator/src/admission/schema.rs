//! From Kubernetes' structural schemas to JSON Schema, and from its errors to field paths.

use jsonschema::ValidationError;
use jsonschema::error::ValidationErrorKind;
use serde_json::{Map, Number, Value, json};

use super::Violation;

/// `schema` in the words of JSON Schema: unknown fields are refused as `kubectl` does, `nullable` and integer-or-string become what they mean.
pub fn strict(schema: &Value) -> Value {
    let Value::Object(members) = schema else { return schema.clone() };
    let mut strict: Map<String, Value> = Map::new();
    for (key, value) in members {
        let value = match (key.as_str(), value) {
            ("properties", Value::Object(properties)) => {
                properties.iter().map(|(name, value)| (name.clone(), self::strict(value))).collect()
            }
            ("items" | "additionalProperties", value) => self::strict(value),
            ("anyOf" | "allOf" | "oneOf", Value::Array(all)) => all.iter().map(self::strict).collect(),
            ("x-kubernetes-validations" | "default" | "format", _) => continue,
            (_, value) => value.clone(),
        };
        strict.insert(key.clone(), value);
    }
    if members.get("nullable") == Some(&json!(true))
        && let Some(kind) = members.get("type")
    {
        strict.insert("type".to_owned(), json!([kind, "null"]));
    }
    // The types in an `anyOf` beside it are dropped from a definition.
    if members.get("x-kubernetes-int-or-string") == Some(&json!(true)) {
        strict.insert("type".to_owned(), json!(["integer", "string"]));
    }
    if members.contains_key("properties") && !members.contains_key("additionalProperties") {
        strict.insert("additionalProperties".to_owned(), json!(false));
    }
    Value::Object(strict)
}

/// What an API server makes of JSON: null is absent, and a number without a fraction is an integer, however it is written (`4.0`, `1e1`).
pub fn plain(value: &Value) -> Value {
    match value {
        Value::Object(members) => {
            members.iter().filter(|(_, value)| !value.is_null()).map(|(key, value)| (key.clone(), plain(value))).collect()
        }
        Value::Array(items) => items.iter().map(plain).collect(),
        Value::Number(number) => json!(whole(number).map_or_else(|| number.clone(), Number::from)),
        other => other.clone(),
    }
}

#[allow(clippy::cast_possible_truncation)] // it is in range
fn whole(number: &Number) -> Option<i64> {
    let decimal = number.as_f64().filter(|decimal| number.is_f64() && decimal.fract() == 0.0 && decimal.abs() < 2f64.powi(63))?;
    Some(decimal as i64)
}

/// What an API server does not look at any more once it has found a violation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stops {
    /// It looks at everything.
    Nothing,
    /// CEL rules are not evaluated.
    Rules,
    /// Nothing but what else cannot be decoded is reported.
    All,
}

/// What a JSON Schema error says, at the field it means.
pub fn violations(error: &ValidationError<'_>) -> Vec<(Stops, Violation)> {
    let at = field_path(error.instance_path().as_str());
    let below = |name: &str| if at.is_empty() { name.to_owned() } else { format!("{at}.{name}") };
    match error.kind() {
        ValidationErrorKind::AdditionalProperties { unexpected } => {
            unexpected.iter().map(|name| (Stops::All, Violation::new(below(name), "unknown field"))).collect()
        }
        ValidationErrorKind::Required { property } => {
            vec![(Stops::Rules, Violation::new(below(property.as_str().unwrap_or_default()), "required field is missing"))]
        }
        ValidationErrorKind::Minimum { .. }
        | ValidationErrorKind::Maximum { .. }
        | ValidationErrorKind::MinLength { .. }
        | ValidationErrorKind::MinItems { .. }
        | ValidationErrorKind::Pattern { .. } => vec![(Stops::Nothing, Violation::new(at, error.to_string()))],
        _ => vec![(Stops::Rules, Violation::new(at, error.to_string()))],
    }
}

/// Enters the items that a list of type `set` or `map` has twice, the latter by their keys.
pub fn twice(schema: &Value, value: &Value, at: &str, violations: &mut Vec<Violation>) {
    let below = |name: &str| if at.is_empty() { name.to_owned() } else { format!("{at}.{name}") };
    match value {
        Value::Object(members) => {
            members.iter().for_each(|(name, member)| twice(&schema["properties"][name], member, &below(name), violations));
        }
        Value::Array(items) => {
            let keys: Vec<&str> = schema["x-kubernetes-list-map-keys"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
            let identity = |item: &Value| match schema["x-kubernetes-list-type"].as_str() {
                Some("set") => Some(item.clone()),
                Some("map") => Some(keys.iter().map(|key| ((*key).to_owned(), item[key].clone())).collect()),
                _ => None,
            };
            let mut seen = Vec::new();
            for (index, item) in items.iter().enumerate() {
                let at = format!("{at}[{index}]");
                twice(&schema["items"], item, &at, violations);
                match identity(item) {
                    Some(identity) if seen.contains(&identity) => violations.push(Violation::new(at, format!("{identity} is there twice"))),
                    identity => seen.extend(identity),
                }
            }
        }
        _ => {}
    }
}

/// `/spec/pools/0/name` as `spec.pools[0].name`.
fn field_path(pointer: &str) -> String {
    let mut path = String::new();
    for token in pointer.split('/').skip(1) {
        let token = token.replace("~1", "/").replace("~0", "~");
        if token.contains(['.', '/']) || token.chars().all(|c| c.is_ascii_digit()) {
            path.push_str(&format!("[{token}]"));
        } else {
            if !path.is_empty() {
                path.push('.');
            }
            path.push_str(&token);
        }
    }
    path
}

/// Enters the members of `given` that `known`, the same value after decoding, has lost.
pub fn unknown_fields(at: &str, given: &Value, known: &Value, violations: &mut Vec<Violation>) {
    let below = |name: &str| if at.is_empty() { name.to_owned() } else { format!("{at}.{name}") };
    match (given, known) {
        (Value::Object(given), Value::Object(known)) => {
            for (name, value) in given {
                match known.get(name) {
                    Some(known) => unknown_fields(&below(name), value, known, violations),
                    None if value.is_null() || value.as_object().is_some_and(Map::is_empty) => {}
                    None => violations.push(Violation::new(below(name), "unknown field")),
                }
            }
        }
        (Value::Array(given), Value::Array(known)) => {
            for (index, (value, known)) in given.iter().zip(known).enumerate() {
                unknown_fields(&format!("{at}[{index}]"), value, known, violations);
            }
        }
        _ => {}
    }
}
