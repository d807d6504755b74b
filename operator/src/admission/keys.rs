//! What an API server asks of ConfigMaps and Secrets: each key becomes a file in pods, and what is `immutable` stays as it is.

use std::collections::BTreeSet;

use serde_json::Value;

use super::Violation;

/// Bytes of all values.
const BYTES: usize = 1 << 20;
/// Bytes of a key.
const LENGTH: usize = 253;

/// Checks members: the field that they are of, their keys, and how many bytes they hold.
///
/// # Errors
/// Every key that no file can have, and those that are there twice.
pub fn check<'a>(members: impl Iterator<Item = (&'static str, &'a String, usize)>) -> Result<(), Vec<Violation>> {
    let (mut violations, mut seen, mut bytes) = (Vec::new(), BTreeSet::new(), 0);
    for (field, key, length) in members {
        bytes += length;
        let at = || format!("{field}[{key}]");
        if !is_key(key) {
            let rule = "a key is a file's name: at most 253 letters, digits, '-', '_' and '.', and does not begin with \"..\"";
            violations.push(Violation::new(at(), format!("{key:?} is no valid key: {rule}")));
        }
        if !seen.insert(key) {
            violations.push(Violation::new(at(), "is a key of data too"));
        }
    }
    if bytes > BYTES {
        violations.push(Violation::new("", format!("holds {bytes} bytes, more than {BYTES}: use a volume")));
    }
    if violations.is_empty() { Ok(()) } else { Err(violations) }
}

/// Compares what is stored with what shall replace it.
///
/// # Errors
/// Every change of what is `immutable`, and of a Secret's type.
pub fn unchanged(old: Option<&Value>, new: &Value) -> Result<(), Vec<Violation>> {
    let Some(old) = old else { return Ok(()) };
    let mut violations = Vec::new();
    if old["immutable"] == true {
        let changed = ["immutable", "data", "binaryData"].into_iter().filter(|field| old[field] != new[field]);
        violations.extend(changed.map(|field| Violation::new(field, "field is immutable when `immutable` is set")));
    }
    if !old["type"].is_null() && !new["type"].is_null() && old["type"] != new["type"] {
        violations.push(Violation::new("type", "field is immutable"));
    }
    if violations.is_empty() { Ok(()) } else { Err(violations) }
}

fn is_key(key: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    (1..=LENGTH).contains(&key.len()) && key.bytes().all(allowed) && key != "." && !key.starts_with("..")
}
