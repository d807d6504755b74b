//! Which files of a folder hold its weights.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Component, Path, PathBuf};

use serde::Deserialize;

use super::error::ModelError;

/// Names the file of every tensor of a model that is cut in several.
const INDEX: &str = "model.safetensors.index.json";
/// The one file of a model that is not.
const WHOLE: &str = "model.safetensors";
/// Largest index that is read, bytes.
const MAX_INDEX: u64 = 64 << 20;

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

/// The files, sorted by name: those that the index names; without one `model.safetensors`; without that all that do not look like something else.
///
/// Files beside them (an adapter, a consolidated copy) are other weights, or the same once more.
///
/// # Errors
/// When there is none, the index cannot be used, or a file that it names is not there.
pub(super) fn find(folder: &Path) -> Result<Vec<PathBuf>, ModelError> {
    let index = folder.join(INDEX);
    if index.exists() {
        return named(folder, &index);
    }
    let whole = folder.join(WHOLE);
    if whole.exists() {
        return Ok(vec![whole]);
    }
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).map_err(ModelError::read(folder))? {
        let path = entry.map_err(ModelError::read(folder))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let other = ["._", "adapter_", "consolidated"].iter().any(|prefix| name.starts_with(prefix));
        if !other && path.extension().is_some_and(|extension| extension == "safetensors") {
            files.push(path);
        }
    }
    files.sort();
    match files.is_empty() {
        true => Err(ModelError::invalid(folder, "*.safetensors", "no such file in the folder")),
        false => Ok(files),
    }
}

fn named(folder: &Path, index: &Path) -> Result<Vec<PathBuf>, ModelError> {
    let invalid = |at: &str, problem: String| ModelError::invalid(index, at, problem);
    let length = fs::metadata(index).map_err(ModelError::read(index))?.len();
    if length > MAX_INDEX {
        return Err(invalid("index", format!("it has {length} bytes, more than {MAX_INDEX}")));
    }
    let text = fs::read(index).map_err(ModelError::read(index))?;
    let Index { weight_map } = serde_json::from_slice(&text).map_err(|error| invalid("index", error.to_string()))?;
    let mut names: Vec<&String> = weight_map.values().collect();
    names.sort_unstable();
    names.dedup();
    if names.is_empty() {
        return Err(invalid("weight_map", "it names no file".to_owned()));
    }
    if let Some(name) = names.iter().find(|name| !matches!(Path::new(name).components().collect::<Vec<_>>()[..], [Component::Normal(_)])) {
        return Err(invalid("weight_map", format!("{name:?} is not the name of a file in the folder")));
    }
    let files: Vec<PathBuf> = names.into_iter().map(|name| folder.join(name)).collect();
    match files.iter().find(|file| !file.exists()) {
        Some(missing) => Err(ModelError::invalid(missing, INDEX, "names this file, but it is missing")),
        None => Ok(files),
    }
}
