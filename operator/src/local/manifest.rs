//! Manifests: files of YAML documents, admitted as an API server would, refused with file, document, line and field.

use std::fs;
use std::path::{Path, PathBuf};

use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, PersistentVolumeClaim, Secret};
use serde_json::{Value, json};

use super::refuse;
use super::store::{Key, Store};
use super::yaml::{self, Lines};
use crate::admission::{self, Admission, Violation, keys};

/// Kinds that local mode takes beside its own three, with their apiVersion.
const BUILT_IN: [&str; 4] = ["ConfigMap", "Secret", "PersistentVolumeClaim", "Namespace"];

/// One document of a file.
#[derive(Clone, Debug)]
pub struct Document {
    file: PathBuf,
    number: usize,
    lines: Lines,
    /// What it says.
    pub value: Value,
}

/// A refused document, with every reason.
#[derive(Debug, thiserror::Error)]
#[error("{}", .0.join("\n"))]
pub struct Refused(pub Vec<String>);

impl Document {
    /// Itself, or what a `List` holds, as `kubectl get --output yaml` writes several objects.
    fn items(mut self) -> Vec<Self> {
        let is_list = self.value["kind"] == "List" && self.value["apiVersion"] == "v1";
        let items = self.value.get_mut("items").and_then(Value::as_array_mut).filter(|_| is_list);
        let Some(items) = items.map(std::mem::take) else { return vec![self] };
        let lines_of = |index: usize| {
            let prefix = format!("items[{index}]");
            let below = |(path, line): (&String, &usize)| Some((path.strip_prefix(&prefix)?.trim_start_matches('.').to_owned(), *line));
            self.lines.iter().filter_map(below).collect()
        };
        let document = |(index, value)| Self { file: self.file.clone(), number: self.number, lines: lines_of(index), value };
        items.into_iter().enumerate().map(document).collect()
    }

    /// `FILE, document N (KIND/NAME), line L: FIELD: REASON`.
    fn say(&self, violation: &Violation) -> String {
        let key = Key::of_value(&self.value);
        let line = yaml::line_of(&self.lines, &violation.field);
        let field = if violation.field.is_empty() { String::new() } else { format!("{}: ", violation.field) };
        format!("{}, document {} ({key}), line {line}: {field}{}", self.file.display(), self.number, violation.reason)
    }
}

/// Reads files, and the `.yaml`, `.yml` and `.json` files of folders, in the order of their names.
///
/// # Errors
/// When a file cannot be read or is no YAML; the error names it, the document and the line.
pub fn read(paths: &[PathBuf]) -> Result<Vec<Document>, Refused> {
    let mut documents = Vec::new();
    let mut errors = Vec::new();
    for path in paths {
        match files(path) {
            Ok(files) => files.iter().for_each(|file| match parse(file) {
                Ok(found) => documents.extend(found),
                Err(error) => errors.push(error),
            }),
            Err(error) => errors.push(format!("{}: {error}", path.display())),
        }
    }
    if documents.is_empty() && errors.is_empty() {
        errors.push("no manifest found: -f takes files and folders of .yaml, .yml and .json files".to_owned());
    }
    if errors.is_empty() { Ok(documents) } else { Err(Refused(errors)) }
}

/// Admits every document; what is stored now decides what may change.
///
/// # Errors
/// Every reason of every document: nothing is started when one is refused.
pub fn admit(
    documents: &[Document],
    admission: &Admission,
    store: &Store,
    volumes: &dyn Fn(&str, &str) -> bool,
) -> Result<Vec<Value>, Refused> {
    let mut admitted: Vec<Value> = Vec::new();
    let mut errors = Vec::new();
    for document in documents {
        match admit_one(document, admission, store) {
            Ok(value) => match admitted.iter().find(|other| Key::of_value(other) == Key::of_value(&value)) {
                Some(other) if *other == value => {}
                Some(_) => errors.push(document.say(&Violation::new("metadata.name", "is defined twice, and differently"))),
                None => admitted.push(value),
            },
            Err(violations) => errors.extend(violations.iter().map(|violation| document.say(violation))),
        }
    }
    let claims: Vec<Key> = admitted.iter().map(Key::of_value).collect();
    let has_claim =
        |namespace: &str, name: &str| volumes(namespace, name) || claims.contains(&Key::of::<PersistentVolumeClaim>(namespace, name));
    for document in documents {
        errors.extend(refuse::violations(&document.value, &has_claim).iter().map(|violation| document.say(violation)));
    }
    if errors.is_empty() { Ok(admitted) } else { Err(Refused(errors)) }
}

fn admit_one(document: &Document, admission: &Admission, store: &Store) -> Result<Value, Vec<Violation>> {
    let value = &document.value;
    if !value.is_object() {
        return Err(vec![Violation::new("", "is not an object")]);
    }
    let text = |field: &str| value[field].as_str().ok_or_else(|| vec![Violation::new(field, "is missing or not a text")]);
    let (kind, version) = (text("kind")?, text("apiVersion")?);
    let served = |wanted: &str| match version == wanted {
        true => Ok(()),
        false => Err(vec![Violation::new("apiVersion", format!("{version:?} is not served for kind {kind}: use {wanted}"))]),
    };
    let old = store.value(&Key::of_value(value));
    if admission.knows(kind) {
        served(&admission::api_version())?;
        return admission.admit(value, old);
    }
    if !BUILT_IN.contains(&kind) {
        let known = "BaseModelPool, CarryOnJob, CarryOnDeployment, ConfigMap, Secret, PersistentVolumeClaim, Namespace";
        return Err(vec![Violation::new("kind", format!("local mode has no kind {kind:?} of {version}; it has {known}"))]);
    }
    served("v1")?;
    let admitted = match kind {
        "ConfigMap" => admission::admit_built_in::<ConfigMap>(value).and_then(|object| {
            let text = object.data.iter().flatten().map(|(key, text)| ("data", key, text.len()));
            let bytes = object.binary_data.iter().flatten().map(|(key, bytes)| ("binaryData", key, bytes.0.len()));
            keys::check(text.chain(bytes)).map(|()| json!(object))
        }),
        "Secret" => admission::admit_built_in::<Secret>(value).map(with_data).and_then(|object| {
            let data = object.data.iter().flatten().map(|(key, bytes)| ("data", key, bytes.0.len()));
            keys::check(data).map(|()| json!(object))
        }),
        "PersistentVolumeClaim" => admission::admit_built_in::<PersistentVolumeClaim>(value).map(|object| json!(object)),
        _ => admission::admit_built_in::<Namespace>(value).map(|object| json!(object)),
    }?;
    keys::unchanged(old, &admitted).map(|()| admitted)
}

/// `stringData` goes into `data`, as an API server does.
fn with_data(mut secret: Secret) -> Secret {
    let given = secret.string_data.take().unwrap_or_default();
    if !given.is_empty() {
        let data = secret.data.get_or_insert_default();
        data.extend(given.into_iter().map(|(key, text)| (key, ByteString(text.into_bytes()))));
    }
    secret
}

fn files(path: &Path) -> std::io::Result<Vec<PathBuf>> {
    if !path.is_dir() {
        return fs::metadata(path).map(|_| vec![path.to_owned()]);
    }
    let mut files: Vec<PathBuf> = fs::read_dir(path)?.map(|entry| entry.map(|entry| entry.path())).collect::<Result<_, _>>()?;
    files.retain(|file| file.extension().is_some_and(|extension| ["yaml", "yml", "json"].iter().any(|known| extension == *known)));
    files.sort();
    Ok(files)
}

fn parse(file: &Path) -> Result<Vec<Document>, String> {
    let text = fs::read_to_string(file).map_err(|error| format!("{}: {error}", file.display()))?;
    let documents = yaml::documents(&text).map_err(|fault| {
        let yaml::Fault { document, line, problem } = fault;
        format!("{}, document {document}, line {line}: {problem}", file.display())
    })?;
    let document = |((value, lines), number)| Document { file: file.to_owned(), number, lines, value };
    let documents = documents.into_iter().zip(1..).map(document).filter(|document| !document.value.is_null());
    Ok(documents.flat_map(Document::items).collect())
}
