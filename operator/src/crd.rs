//! The three CustomResourceDefinitions, as an API server gets them and as local mode reads them.

use carryon_crds::{BaseModelPool, CarryOnDeployment, CarryOnJob};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::CustomResourceExt as _;
use serde_json::{Map, Value};

/// Longest value of an environment variable.
const ENV: i64 = 32_768;

/// The definitions, in the order in which a user meets the kinds.
pub fn all() -> Vec<CustomResourceDefinition> {
    vec![BaseModelPool::crd(), CarryOnJob::crd(), CarryOnDeployment::crd()].into_iter().map(clean).collect()
}

/// The definitions as one multi-document YAML text.
pub fn yaml() -> Result<String, serde_yaml::Error> {
    all().iter().map(|crd| serde_yaml::to_string(crd).map(|text| format!("---\n{text}"))).collect()
}

/// The openAPIV3Schema of `crd`'s only version.
pub fn schema(crd: &CustomResourceDefinition) -> Value {
    crd.spec
        .versions
        .first()
        .and_then(|version| version.schema.as_ref())
        .map_or(Value::Null, |schema| serde_json::to_value(&schema.open_api_v3_schema).expect("a schema is JSON"))
}

/// Leaves out what an API server warns of, number formats that OpenAPI does not know, and bounds what Kubernetes' own types leave open.
fn clean(crd: CustomResourceDefinition) -> CustomResourceDefinition {
    let mut value = serde_json::to_value(crd).expect("a definition is JSON");
    each_object(&mut value, &|members| {
        if members.get("format").and_then(Value::as_str).is_some_and(|format| format.starts_with("uint")) {
            members.remove("format");
        }
        // These come without bounds, which the CEL rules beside them need, and with the text of Kubernetes' documentation, which
        // `kubectl explain pod.spec` has already.
        if let Some(scheduling) = members.get_mut("scheduling") {
            fields(scheduling).for_each(bound);
        }
        if let Some(selector) = members.get_mut("selector").filter(|selector| selector["type"] == "object") {
            fields(selector).for_each(bound_below);
        }
        for name in ["env", "volumeMounts"] {
            if let Some(list) = members.get_mut(name).filter(|list| list["type"] == "array") {
                list["items"]["properties"].get_mut("value").into_iter().for_each(|value| default_to(value, "maxLength", ENV));
                bound(list);
            }
        }
    });
    serde_json::from_value(value).expect("only formats were removed and bounds added")
}

/// Visits every object in `value`, the outer ones first.
fn each_object(value: &mut Value, visit: &impl Fn(&mut Map<String, Value>)) {
    match value {
        Value::Object(members) => {
            visit(members);
            members.values_mut().for_each(|member| each_object(member, visit));
        }
        Value::Array(items) => items.iter_mut().for_each(|item| each_object(item, visit)),
        _ => {}
    }
}

/// The schemas of an object's fields.
fn fields(schema: &mut Value) -> impl Iterator<Item = &mut Value> {
    schema.get_mut("properties").and_then(Value::as_object_mut).into_iter().flat_map(Map::values_mut)
}

/// Bounds a schema and all below it; its own description stays.
fn bound(schema: &mut Value) {
    match schema["type"].as_str() {
        Some("string") if schema.get("enum").is_none() => default_to(schema, "maxLength", 512),
        Some("array") => default_to(schema, "maxItems", 64),
        Some("object") if schema.get("additionalProperties").is_some() => default_to(schema, "maxProperties", 64),
        Some("integer") => {
            default_to(schema, "minimum", 0);
            default_to(schema, "maximum", i64::from(i32::MAX));
        }
        _ => {}
    }
    fields(schema).for_each(bound_below);
    for name in ["items", "additionalProperties"] {
        schema.get_mut(name).into_iter().for_each(bound_below);
    }
}

fn bound_below(schema: &mut Value) {
    if let Some(members) = schema.as_object_mut() {
        members.remove("description");
        bound(schema);
    }
}

fn default_to(schema: &mut Value, name: &str, value: i64) {
    if schema.get(name).is_none() {
        schema[name] = value.into();
    }
}
