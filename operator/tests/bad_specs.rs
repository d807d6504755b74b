//! Refused objects: the same field path and reason that `kubectl apply` would show.
#![allow(clippy::unwrap_used)]

mod common;

use carryon_operator::admission::Admission;
use common::{patched, raw};
use serde::Deserialize;
use serde_json::Value;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Case {
    name: String,
    kind: String,
    old: Option<Value>,
    patch: Value,
    expect: Vec<String>,
}

#[test]
fn every_case_is_refused_with_field_path_and_reason() {
    let cases: Vec<Case> = serde_yaml::from_str(include_str!("fixtures/bad_specs.yaml")).unwrap();
    assert!(cases.len() >= 50);
    let admission = Admission::new().unwrap();
    let mut failures = Vec::new();
    for case in &cases {
        let example = raw(&format!("quickstart/{}.yaml", case.kind));
        let old = case.old.as_ref().map(|patch| admission.admit(&patched(example.clone(), patch), None).unwrap());
        let violations = admission.admit(&patched(example, &case.patch), old.as_ref()).err().unwrap_or_default();
        let violations: Vec<String> = violations.iter().map(ToString::to_string).collect();
        if violations != case.expect {
            failures.push(format!("{}:\n  expected {:?}\n  got      {violations:?}", case.name, case.expect));
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}
