//! The committed CRDs, and what an API server asks of them.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;

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

/// `kind field: word` for each field of a spec, with the word that README's table has for it.
fn table() -> BTreeSet<String> {
    let readme = std::fs::read_to_string("../README.md").unwrap();
    let (_, table) = readme.split_once("| field | since | may change |").unwrap();
    let rows = table.lines().skip(2).take_while(|line| line.starts_with("| "));
    rows.flat_map(|row| {
        let [_, fields, since, word, _] = row.split('|').map(str::trim).collect::<Vec<_>>()[..] else { panic!("{row}") };
        assert!(since.parse::<f64>().is_ok(), "{row}");
        let (kind, fields) = fields.split_once(": ").unwrap();
        let word = word.split([':', ' ']).next().unwrap();
        fields.split(", ").map(|field| format!("{kind} {}: {word}", field.trim_matches('`'))).collect::<Vec<_>>()
    })
    .collect()
}

#[test]
fn readme_says_of_each_field_whether_it_may_change() {
    let kinds = ["pool", "job", "deployment"].into_iter().zip(crd::all());
    let fields = kinds.flat_map(|(kind, crd)| {
        let (schema, mut rules) = (crd::schema(&crd), String::new());
        visit(&schema, "", &mut |_, schema| rules += &schema["x-kubernetes-validations"].to_string());
        let word = |field: &str| match field {
            _ if rules.contains(&format!("self.{field} == oldSelf.{field}")) => "never",
            _ if rules.contains(&format!("self.spec.{field} == oldSelf.spec.{field}")) => "until",
            _ => "yes",
        };
        let fields = schema["properties"]["spec"]["properties"].as_object().unwrap().keys();
        fields.map(|field| format!("{kind} {field}: {}", word(field))).collect::<Vec<_>>()
    });
    assert_eq!(table(), fields.collect());
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
