//! Which files of a folder hold its weights.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Component, Path, PathBuf};

use serde::Deserialize;

use super::error::ModelError;

/// Names the file of every tensor of a model that is cut in several.
pub(super) const INDEX: &str = "model.safetensors.index.json";
/// The one file of a model that is not.
const WHOLE: &str = "model.safetensors";
/// Largest index that is read, bytes.
const MAX_INDEX: u64 = 64 << 20;

/// The files of a folder.
pub(super) struct Shards {
    /// Sorted by name.
    pub files: Vec<PathBuf>,
    /// Which of them each tensor is in, as the index says; empty without one.
    pub weight_map: BTreeMap<String, String>,
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

/// Those that the index names; without one `model.safetensors`; without that all that do not look like something else.
///
/// Files beside them (an adapter, a consolidated copy) are other weights, or the same once more.
///
/// # Errors
/// When there is none, the index cannot be used, a file that it names is not there, or it leaves out one of a set that it names others of.
pub(super) fn find(folder: &Path) -> Result<Shards, ModelError> {
    let index = folder.join(INDEX);
    if index.exists() {
        return named(folder, &index);
    }
    let whole = folder.join(WHOLE);
    if whole.exists() {
        return Ok(Shards { files: vec![whole], weight_map: BTreeMap::new() });
    }
    let mut files = Vec::new();
    for path in weight_files(folder)? {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if !["._", "adapter_", "consolidated"].iter().any(|prefix| name.starts_with(prefix)) {
            files.push(path);
        }
    }
    match files.is_empty() {
        true => Err(ModelError::invalid(folder, "*.safetensors", "no such file in the folder")),
        false => Ok(Shards { files, weight_map: BTreeMap::new() }),
    }
}

/// Every `*.safetensors`, sorted by name.
fn weight_files(folder: &Path) -> Result<Vec<PathBuf>, ModelError> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).map_err(ModelError::read(folder))? {
        let path = entry.map_err(ModelError::read(folder))?.path();
        if path.extension().is_some_and(|extension| extension == "safetensors") {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

fn named(folder: &Path, index: &Path) -> Result<Shards, ModelError> {
    let weight_map = read_index(index)?;
    let names: BTreeSet<&str> = weight_map.values().map(String::as_str).collect();
    let files: Vec<PathBuf> = names.iter().map(|name| folder.join(name)).collect();
    if let Some(missing) = files.iter().find(|file| !file.exists()) {
        return Err(ModelError::invalid(missing, INDEX, "names this file, but it is missing"));
    }
    let sets: BTreeSet<_> = names.iter().filter_map(|name| set(name)).collect();
    for path in weight_files(folder)? {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if !names.contains(&*name) && set(&name).is_some_and(|set| sets.contains(&set)) {
            return Err(ModelError::invalid(&path, INDEX, "does not name this file, but others of the same set"));
        }
    }
    Ok(Shards { files, weight_map })
}

/// The set that a file is one of, by its name: `model-00001-of-00003.safetensors` is one of 00003 of `model`.
fn set(name: &str) -> Option<(&str, &str)> {
    let (part, count) = name.strip_suffix(".safetensors")?.rsplit_once("-of-")?;
    let (stem, number) = part.rsplit_once('-')?;
    number.bytes().all(|byte| byte.is_ascii_digit()).then_some((stem, count))
}

/// The file of every tensor. Each is a name, not a path elsewhere.
fn read_index(index: &Path) -> Result<BTreeMap<String, String>, ModelError> {
    let invalid = |at: &str, problem: String| ModelError::invalid(index, at, problem);
    let length = fs::metadata(index).map_err(ModelError::read(index))?.len();
    if length > MAX_INDEX {
        return Err(invalid("index", format!("it has {length} bytes, more than {MAX_INDEX}")));
    }
    let text = fs::read(index).map_err(ModelError::read(index))?;
    let Index { weight_map } = serde_json::from_slice(&text).map_err(|error| invalid("index", error.to_string()))?;
    if weight_map.is_empty() {
        return Err(invalid("weight_map", "it names no file".to_owned()));
    }
    let plain = |name: &str| matches!(Path::new(name).components().collect::<Vec<_>>()[..], [Component::Normal(_)]);
    match weight_map.values().find(|name| !plain(name)) {
        Some(name) => Err(invalid("weight_map", format!("{name:?} is not the name of a file in the folder"))),
        None => Ok(weight_map),
    }
}
