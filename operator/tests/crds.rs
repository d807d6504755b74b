//! The committed CRDs, and what an API server asks of them.
#![allow(clippy::unwrap_used)]

use carryon_operator::crd;
use kube::core::cel::{ScopeContext, analyze_rule, compile_schema};
use serde_json::Value;

#[test]
fn committed_yaml_is_what_the_types_say() {
    let path = "../crds/crds.yaml";
    let committed = std::fs::read_to_string(path).unwrap();
    assert!(committed == crd::yaml().unwrap(), "crds/crds.yaml is stale: run `carryon-operator crds > crds/crds.yaml`");
}

#[test]
fn every_rule_compiles_and_is_cheap_enough() {
    for crd in crd::all() {
        let mut rules = 0;
        visit(&crd::schema(&crd), "", &mut |path, schema| {
            let compiled = compile_schema(schema);
            assert!(!compiled.has_errors(), "{path}: {:?}", compiled.compilation_errors());
            for rule in schema["x-kubernetes-validations"].as_array().into_iter().flatten() {
                let text = rule["rule"].as_str().unwrap();
                let warnings = analyze_rule(text, &compiled, ScopeContext::CrdValidation);
                let costly: Vec<_> = warnings.iter().filter(|warning| warning.message.contains("cost")).collect();
                assert!(costly.is_empty(), "{path}: {costly:?}");
                assert!(rule["message"].is_string(), "{path}: {text} has no message");
                rules += 1;
            }
        });
        assert!(rules > 0, "{} has no rule", crd.spec.names.kind);
    }
}

#[test]
fn every_string_and_list_of_a_spec_is_bounded() {
    for crd in crd::all() {
        visit(&crd::schema(&crd)["properties"]["spec"], "spec", &mut |path, schema| {
            let bounded = match schema["type"].as_str() {
                Some("string") => ["enum", "maxLength", "pattern"].iter().any(|key| schema.get(key).is_some()),
                Some("array") => schema.get("maxItems").is_some(),
                Some("integer" | "number") => schema.get("minimum").is_some() && schema.get("maximum").is_some(),
                _ => true,
            };
            assert!(bounded, "{}: {path} has no bound: {schema}", crd.spec.names.kind);
        });
    }
}

fn visit(schema: &Value, path: &str, look: &mut impl FnMut(&str, &Value)) {
    look(path, schema);
    for (name, property) in schema["properties"].as_object().into_iter().flatten() {
        visit(property, &format!("{path}.{name}"), look);
    }
    if schema["items"].is_object() {
        visit(&schema["items"], &format!("{path}[]"), look);
    }
}
