//! The members of a configuration under the names of `config.json`, wherever they come from.

use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::metadata;
use crate::model::error::ModelError;
use crate::model::gguf::Gguf;

/// Where the configuration stands.
#[derive(Clone)]
enum Origin {
    Json,
    /// Architecture.
    Gguf(String),
}

/// The members of a configuration.
pub struct Keys {
    path: PathBuf,
    values: Map<String, Value>,
    origin: Origin,
    name: Option<String>,
}

impl Keys {
    /// The members of a `config.json`; a model without a name of its own has that of its folder.
    pub fn json(path: &Path, values: Map<String, Value>, folder: Option<String>) -> Self {
        Self { path: path.to_owned(), values, origin: Origin::Json, name: folder }
    }

    /// The metadata of a GGUF file, under the names of `config.json`.
    ///
    /// # Errors
    /// When the architecture is missing, or a value is of another type than its key has.
    pub fn gguf(gguf: &Gguf) -> Result<Self, ModelError> {
        let path = gguf.path();
        let missing = || ModelError::invalid(path, "general.architecture", "key is missing");
        let architecture = gguf.text("general.architecture")?.ok_or_else(missing)?.to_owned();
        let values = metadata::members(gguf, &architecture)?;
        // For people alone: no reason to refuse a model.
        let name = gguf.text("general.name").ok().flatten().map(str::to_owned);
        Ok(Self { path: path.to_owned(), values, origin: Origin::Gguf(architecture), name })
    }

    /// Whether this is the metadata of a GGUF file.
    pub fn is_gguf(&self) -> bool {
        matches!(self.origin, Origin::Gguf(_))
    }

    /// The model's name, if it has one.
    pub fn name(&self) -> Option<&str> {
        self.name.as_deref()
    }

    /// A member, if it is there and not null.
    ///
    /// # Errors
    /// When it is of another type.
    pub fn optional<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>, ModelError> {
        match self.values.get(name).filter(|value| !value.is_null()) {
            Some(value) => serde_json::from_value(value.clone()).map(Some).map_err(|error| self.invalid(name, error.to_string())),
            None => Ok(None),
        }
    }

    /// A member that has to be there.
    ///
    /// # Errors
    /// When it is missing or of another type.
    pub fn required<T: DeserializeOwned>(&self, name: &str) -> Result<T, ModelError> {
        self.optional(name)?.ok_or_else(|| self.invalid(name, "key is missing"))
    }

    /// Refuses a member that is there and has another value than the one whose computation is done.
    ///
    /// # Errors
    /// When that is so.
    pub fn refuse_unless(&self, name: &str, done: &[Value]) -> Result<(), ModelError> {
        match self.values.get(name).filter(|value| !value.is_null() && !done.contains(value)) {
            Some(Value::String(found)) => Err(self.unsupported(name, format!("`{found}`"))),
            Some(found) => Err(self.unsupported(name, found.to_string())),
            None => Ok(()),
        }
    }

    /// The members of the object at `name`, which keep their path.
    ///
    /// # Errors
    /// When it is there and no object.
    pub fn object(&self, name: &str) -> Result<Option<Self>, ModelError> {
        let Some(values) = self.optional(name)? else { return Ok(None) };
        Ok(Some(Self { path: self.path.clone(), values, origin: self.origin.clone(), name: self.name.clone() }))
    }

    /// The same members, and these where they are not written; a GGUF file writes all that it has to.
    pub fn with_defaults(&self, defaults: Value) -> Self {
        let (mut values, origin) = (self.values.clone(), self.origin.clone());
        if let (Value::Object(defaults), Origin::Json) = (defaults, &origin) {
            defaults.into_iter().for_each(|(name, value)| _ = values.entry(name).or_insert(value));
        }
        Self { path: self.path.clone(), values, origin, name: self.name.clone() }
    }

    /// An error at a member, under the file's own name for it.
    pub fn invalid(&self, name: &str, problem: impl Into<String>) -> ModelError {
        ModelError::invalid(&self.path, self.own_name(name), problem)
    }

    /// A member that asks for what is not done.
    pub fn unsupported(&self, name: &str, found: impl Into<String>) -> ModelError {
        ModelError::unsupported(&self.path, self.own_name(name), found)
    }

    fn own_name(&self, name: &str) -> String {
        match &self.origin {
            Origin::Gguf(_) if name == "model_type" => "general.architecture".to_owned(),
            Origin::Gguf(architecture) => {
                let known = metadata::NAMES.iter().find(|(known, _)| *known == name);
                known.map_or_else(|| name.to_owned(), |(_, key)| format!("{architecture}.{key}"))
            }
            Origin::Json => name.to_owned(),
        }
    }
}
