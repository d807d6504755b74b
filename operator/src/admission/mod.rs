//! What an API server does with an object before it stores it: refuse unknown fields and values out of range, fill in
//! defaults, evaluate the CEL rules. Local mode goes through here; a test compares verdicts with a real API server's.

pub mod keys;
pub mod schema;

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::core::cel::{RootContext, Validator, apply_defaults};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use self::schema::Stops;
use crate::crd;

/// One reason why an object is refused.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, thiserror::Error)]
#[error("{field}: {reason}")]
pub struct Violation {
    /// Path of the field, e.g. `spec.training.seed`; `metadata` and the like for the object itself.
    pub field: String,
    /// What is wrong with it.
    pub reason: String,
}

impl Violation {
    /// A violation at `field`.
    pub fn new(field: impl Into<String>, reason: impl Into<String>) -> Self {
        Self { field: field.into(), reason: reason.into() }
    }
}

/// The schemas of the three kinds, ready for use.
pub struct Admission {
    kinds: BTreeMap<String, Kind>,
}

struct Kind {
    /// As the CRD has it, with `default` and `x-kubernetes-validations`.
    schema: Value,
    /// The same in the words of JSON Schema, strict about unknown fields.
    strict: jsonschema::Validator,
    context: RootContext,
}

impl Admission {
    /// Compiles the schemas of the CRDs.
    pub fn new() -> Result<Self, String> {
        let kinds = crd::all().into_iter().map(|crd| Ok((crd.spec.names.kind.clone(), Kind::new(&crd)?)));
        Ok(Self { kinds: kinds.collect::<Result<_, String>>()? })
    }

    /// Whether `kind` is one of the three.
    pub fn knows(&self, kind: &str) -> bool {
        self.kinds.contains_key(kind)
    }

    /// The object as it would be stored, with defaults filled in; `old` is what is stored now.
    ///
    /// # Errors
    /// The violations an API server would report, in the order of the fields: unknown fields alone if there are any; CEL rules only
    /// of objects whose members are all there and of their types.
    pub fn admit(&self, object: &Value, old: Option<&Value>) -> Result<Value, Vec<Violation>> {
        let name = object["kind"].as_str().unwrap_or_default();
        let kind = self
            .kinds
            .get(name)
            .ok_or_else(|| vec![Violation::new("kind", format!("{name:?} is not a kind of {}", carryon_crds::GROUP))])?;
        let mut found = metadata(&object["metadata"]);
        let object = apply_defaults(&kind.schema, &schema::plain(object));
        found.extend(kind.form(&object));
        match found.iter().map(|(stops, _)| *stops).max().unwrap_or(Stops::Nothing) {
            Stops::All => found.retain(|(stops, _)| *stops == Stops::All),
            Stops::Rules => {}
            Stops::Nothing => found.extend(kind.rules(&object, old).into_iter().map(|violation| (Stops::Nothing, violation))),
        }
        let violations: BTreeSet<Violation> = found.into_iter().map(|(_, violation)| violation).collect();
        if violations.is_empty() { Ok(object) } else { Err(violations.into_iter().collect()) }
    }
}

impl Kind {
    fn new(crd: &CustomResourceDefinition) -> Result<Self, String> {
        let schema = crd::schema(crd);
        let mut strict = schema::strict(&schema);
        // Every schema has these; a CRD leaves them out.
        ["apiVersion", "kind", "metadata"].into_iter().for_each(|member| strict["properties"][member] = json!(true));
        let strict = jsonschema::validator_for(&strict).map_err(|error| format!("schema of {}: {error}", crd.spec.names.kind))?;
        let context =
            RootContext { api_version: api_version(), api_group: carryon_crds::GROUP.to_owned(), kind: crd.spec.names.kind.clone() };
        Ok(Self { schema, strict, context })
    }

    fn form(&self, object: &Value) -> Vec<(Stops, Violation)> {
        let mut twice = Vec::new();
        schema::twice(&self.schema, object, "", &mut twice);
        let twice = twice.into_iter().map(|violation| (Stops::Nothing, violation));
        self.strict.iter_errors(object).flat_map(|error| schema::violations(&error)).chain(twice).collect()
    }

    fn rules(&self, object: &Value, old: Option<&Value>) -> Vec<Violation> {
        let verdict = Validator::new().validate_with_context(&self.schema, object, old, Some(&self.context));
        let errors = verdict.err().map(|errors| errors.into_vec()).unwrap_or_default();
        let field = |path: String| if path.is_empty() { "metadata.name".to_owned() } else { path.trim_start_matches('.').to_owned() };
        errors.into_iter().map(|error| Violation::new(field(error.field_path), error.message)).collect()
    }
}

/// `carryon.dev/v1alpha1`.
pub fn api_version() -> String {
    format!("{}/{}", carryon_crds::GROUP, carryon_crds::VERSION)
}

/// Decodes a built-in object, refusing fields that it does not have.
///
/// # Errors
/// Every unknown field, or the first value of a wrong type.
pub fn admit_built_in<K: DeserializeOwned + Serialize>(object: &Value) -> Result<K, Vec<Violation>> {
    let mut violations: Vec<Violation> = metadata(&object["metadata"]).into_iter().map(|(_, violation)| violation).collect();
    let decoded: K = serde_json::from_value(object.clone()).map_err(|error| vec![Violation::new("", error.to_string())])?;
    let known = serde_json::to_value(&decoded).unwrap_or_default();
    schema::unknown_fields("", object, &known, &mut violations);
    if violations.is_empty() { Ok(decoded) } else { Err(violations) }
}

/// Metadata: a name, in the form of a DNS subdomain, and no unknown fields.
fn metadata(metadata: &Value) -> Vec<(Stops, Violation)> {
    let decoded = match serde_json::from_value::<ObjectMeta>(metadata.clone()) {
        Ok(decoded) => decoded,
        Err(error) => return vec![(Stops::All, Violation::new("metadata", error.to_string()))],
    };
    let mut unknown = Vec::new();
    schema::unknown_fields("metadata", metadata, &json!(decoded), &mut unknown);
    let wrong = match decoded.name.as_deref() {
        None | Some("") => Some("a name is needed".to_owned()),
        Some(name) if !is_subdomain(name) => Some(format!("{name:?} is no DNS subdomain: use a-z, 0-9, '-' and '.'")),
        Some(_) => None,
    };
    let wrong = wrong.map(|reason| (Stops::Rules, Violation::new("metadata.name", reason)));
    let namespace = decoded.namespace.as_deref().filter(|namespace| !namespace.is_empty() && !is_label(namespace));
    let namespace = namespace.map(|namespace| format!("{namespace:?} is no DNS label: use at most 63 of a-z, 0-9 and '-'"));
    let namespace = namespace.map(|reason| (Stops::Rules, Violation::new("metadata.namespace", reason)));
    unknown.into_iter().map(|violation| (Stops::All, violation)).chain(wrong).chain(namespace).collect()
}

fn is_subdomain(name: &str) -> bool {
    name.len() <= 253 && name.split('.').all(is_part)
}

fn is_label(name: &str) -> bool {
    name.len() <= 63 && is_part(name)
}

fn is_part(part: &str) -> bool {
    let edge = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let bytes = part.as_bytes();
    bytes.first().copied().is_some_and(edge)
        && bytes.last().copied().is_some_and(edge)
        && bytes.iter().all(|byte| edge(*byte) || *byte == b'-')
}
