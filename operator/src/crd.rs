//! The three CustomResourceDefinitions, as an API server gets them and as local mode reads them.

use carryon_crds::{BaseModelPool, CarryOnDeployment, CarryOnJob};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::CustomResourceExt as _;
use serde_json::Value;

/// The definitions, in the order in which a user meets the kinds.
pub fn all() -> Vec<CustomResourceDefinition> {
    vec![BaseModelPool::crd(), CarryOnJob::crd(), CarryOnDeployment::crd()].into_iter().map(clean).collect()
}

/// The definitions as one multi-document YAML text.
///
/// # Errors
/// When a definition cannot be written as YAML, which would be a defect of the types.
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

/// Leaves out what an API server warns of: number formats that OpenAPI does not know.
fn clean(crd: CustomResourceDefinition) -> CustomResourceDefinition {
    let mut value = serde_json::to_value(crd).expect("a definition is JSON");
    remove_unknown_formats(&mut value);
    serde_json::from_value(value).expect("only formats were removed")
}

fn remove_unknown_formats(value: &mut Value) {
    match value {
        Value::Object(members) => {
            if members.get("format").and_then(Value::as_str).is_some_and(|format| format.starts_with("uint")) {
                members.remove("format");
            }
            members.values_mut().for_each(remove_unknown_formats);
        }
        Value::Array(items) => items.iter_mut().for_each(remove_unknown_formats),
        _ => {}
    }
}
