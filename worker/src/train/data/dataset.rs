//! Folders as `datasets` and the Hub lay them out: which files are a split.

use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::train::error::DataError;

/// What samples are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// To learn from.
    Train,
    /// To measure with.
    Evaluation,
}

/// Splits by the words that names of files begin with, as the Hub has them.
const SPLITS: &[(Part, &[&str])] = &[
    (Part::Train, &["train", "training"]),
    (Part::Evaluation, &["validation", "valid", "val", "dev"]),
    (Part::Evaluation, &["test", "testing", "eval", "evaluation"]),
];
/// Ends of names of data files.
const KINDS: &[&str] = &["parquet", "jsonl", "json", "arrow"];
/// What describes a data set, and is none.
const DESCRIPTIONS: &[&str] = &["dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"];
/// Largest description, bytes.
const MAX_DESCRIPTION_BYTES: u64 = 1 << 20;

#[derive(Deserialize)]
struct Dict {
    splits: Vec<String>,
}

#[derive(Deserialize)]
struct State {
    #[serde(rename = "_data_files")]
    data_files: Vec<DataFile>,
}

#[derive(Deserialize)]
struct DataFile {
    filename: String,
}

/// The files of a folder that are `part`: those that `save_to_disk` has listed, or those whose names say so. For evaluation `validation`, or
/// `test` where there is none. A folder that says nothing of splits is for training.
///
/// # Errors
/// A folder that holds no such split, or descriptions that name what is not in it.
pub fn files(folder: &Path, part: Part) -> Result<Vec<PathBuf>, DataError> {
    if folder.join("dataset_dict.json").is_file() {
        let Dict { splits } = description(&folder.join("dataset_dict.json"))?;
        let split =
            SPLITS.iter().filter(|(of, _)| *of == part).find_map(|(_, words)| splits.iter().find(|split| words.contains(&split.as_str())));
        return match split {
            Some(split) => saved(&folder.join(split)),
            None => Err(layout(folder, format!("has no split for this, only {}: name one of its folders", splits.join(", ")))),
        };
    }
    if folder.join("state.json").is_file() {
        return saved(folder);
    }
    named(folder, part)
}

/// The files of one split that `save_to_disk` wrote.
fn saved(folder: &Path) -> Result<Vec<PathBuf>, DataError> {
    let State { data_files } = description(&folder.join("state.json"))?;
    let inside = |name: &str| !name.is_empty() && !name.contains(['/', '\\']) && name != "..";
    match data_files.iter().find(|file| !inside(&file.filename)) {
        Some(file) => Err(layout(folder, format!("state.json names {:?}, which is no file in it", file.filename))),
        None if data_files.is_empty() => Err(layout(folder, "state.json names no files".to_owned())),
        None => Ok(data_files.iter().map(|file| folder.join(&file.filename)).collect()),
    }
}

/// The files that are `part` by their names, or by those of their folders.
fn named(folder: &Path, part: Part) -> Result<Vec<PathBuf>, DataError> {
    let mut found = Vec::new();
    for place in [folder.to_owned(), folder.join("data")] {
        for (path, name) in entries(&place) {
            match split_of(&name) {
                Some(split) if path.is_dir() => found.extend(entries(&path).into_iter().map(|(path, _)| (Some(split), path))),
                split => found.push((split, path)),
            }
        }
    }
    found.retain(|(_, path)| is_data(path));
    let of = |split: Option<usize>| found.iter().filter(|(of, _)| *of == split).map(|(_, path)| path.clone()).collect::<Vec<_>>();
    let splits: Vec<Option<usize>> = match part {
        Part::Train if found.iter().all(|(split, _)| split.is_none()) => vec![None],
        part => (0..SPLITS.len()).filter(|&split| SPLITS[split].0 == part).map(Some).collect(),
    };
    let mut files = splits.into_iter().map(of).find(|files| !files.is_empty()).unwrap_or_default();
    files.sort();
    let kind = |path: &PathBuf| path.extension().map(|kind| kind.to_ascii_lowercase());
    match files.iter().find(|file| kind(file) != kind(&files[0])) {
        _ if files.is_empty() => Err(DataError::Folder { path: folder.to_owned() }),
        Some(other) => Err(layout(folder, format!("{:?} and {other:?} may hold the same samples: name the files", files[0]))),
        None => Ok(files),
    }
}

/// Index of the split that a name begins with.
fn split_of(name: &str) -> Option<usize> {
    let word: String = name.chars().take_while(char::is_ascii_alphabetic).collect::<String>().to_ascii_lowercase();
    SPLITS.iter().position(|(_, words)| words.contains(&word.as_str()))
}

fn is_data(path: &Path) -> bool {
    let kind = path.extension().and_then(|kind| kind.to_str()).unwrap_or_default().to_ascii_lowercase();
    let described = path.file_name().and_then(|name| name.to_str()).is_some_and(|name| DESCRIPTIONS.contains(&name));
    KINDS.contains(&kind.as_str()) && !described && path.is_file()
}

/// What is in a folder, but for what is hidden or has no text for a name.
fn entries(folder: &Path) -> Vec<(PathBuf, String)> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let named = entries.filter_map(|entry| Some((entry.path(), entry.file_name().to_str()?.to_owned())));
    named.filter(|(_, name)| !name.starts_with('.')).collect()
}

fn description<T: DeserializeOwned>(path: &Path) -> Result<T, DataError> {
    let read = |cause| DataError::Read { path: path.to_owned(), cause };
    let bytes = match std::fs::metadata(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Err(DataError::Missing { path: path.to_owned() }),
        found => found.map_err(read)?.len(),
    };
    if bytes > MAX_DESCRIPTION_BYTES {
        return Err(DataError::TooLarge { path: path.to_owned(), bytes, limit: MAX_DESCRIPTION_BYTES });
    }
    let text = std::fs::read(path).map_err(read)?;
    serde_json::from_slice(&text).map_err(|error| DataError::Damaged { path: path.to_owned(), problem: error.to_string() })
}

fn layout(folder: &Path, problem: String) -> DataError {
    DataError::Layout { path: folder.to_owned(), problem }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// Files of a folder that holds `names`, without the folder's own name.
    fn found(names: &[(&str, &str)], part: Part) -> Result<String, String> {
        let folder = tempfile::tempdir().unwrap();
        for (name, content) in names {
            fs::create_dir_all(folder.path().join(name).parent().unwrap()).unwrap();
            fs::write(folder.path().join(name), content).unwrap();
        }
        let files = files(folder.path(), part).map_err(|error| error.to_string().replace(folder.path().to_str().unwrap(), "X"))?;
        let name = |path: &PathBuf| path.strip_prefix(folder.path()).unwrap().to_str().unwrap().to_owned();
        Ok(files.iter().map(name).collect::<Vec<_>>().join(" "))
    }

    fn plain(names: &[&str], part: Part) -> Result<String, String> {
        found(&names.iter().map(|name| (*name, "")).collect::<Vec<_>>(), part)
    }

    #[test]
    fn files_of_the_hub_are_found_by_their_names_or_folders() {
        let hub =
            ["README.md", "data/train-00001-of-00002.parquet", "data/train-00000-of-00002.parquet", "data/test-00000-of-00001.parquet"];
        assert_eq!(plain(&hub, Part::Train).unwrap(), "data/train-00000-of-00002.parquet data/train-00001-of-00002.parquet");
        assert_eq!(plain(&hub, Part::Evaluation).unwrap(), "data/test-00000-of-00001.parquet");
        let lines = ["train.jsonl", "dev.jsonl", "test.jsonl", ".train.jsonl", "trainer.jsonl", "dataset_infos.json"];
        assert_eq!(plain(&lines, Part::Train).unwrap(), "train.jsonl");
        assert_eq!(plain(&lines, Part::Evaluation).unwrap(), "dev.jsonl");
        assert_eq!(
            plain(&["train/b.parquet", "train/a.parquet", "validation/c.parquet"], Part::Train).unwrap(),
            "train/a.parquet train/b.parquet"
        );
        assert_eq!(plain(&["b.jsonl", "a.jsonl", "dataset_info.json"], Part::Train).unwrap(), "a.jsonl b.jsonl");
        assert!(plain(&["a.jsonl"], Part::Evaluation).unwrap_err().contains("is a folder"));
        let both = plain(&["train.jsonl", "data/train.parquet"], Part::Train).unwrap_err();
        assert_eq!(both, r#"data folder "X": "X/data/train.parquet" and "X/train.jsonl" may hold the same samples: name the files"#);
    }

    #[test]
    fn what_save_to_disk_wrote_is_read_as_it_lists_it() {
        let state = r#"{"_data_files":[{"filename":"data-00000-of-00002.arrow"},{"filename":"data-00001-of-00002.arrow"}],"_split":null}"#;
        let dict = [("dataset_dict.json", r#"{"splits":["test","train"]}"#), ("train/state.json", state), ("test/state.json", state)];
        assert_eq!(found(&dict, Part::Train).unwrap(), "train/data-00000-of-00002.arrow train/data-00001-of-00002.arrow");
        assert!(found(&dict, Part::Evaluation).unwrap().starts_with("test/data-00000"));
        assert!(found(&[("state.json", state)], Part::Evaluation).unwrap().starts_with("data-00000"));
        let other = [("dataset_dict.json", r#"{"splits":["sft"]}"#)];
        assert_eq!(found(&other, Part::Train).unwrap_err(), r#"data folder "X": has no split for this, only sft: name one of its folders"#);
        let leaves = [("state.json", r#"{"_data_files":[{"filename":"../secret"}]}"#)];
        assert_eq!(found(&leaves, Part::Train).unwrap_err(), r#"data folder "X": state.json names "../secret", which is no file in it"#);
        assert!(found(&[("state.json", "{")], Part::Train).unwrap_err().starts_with("data file \"X/state.json\" is damaged: EOF"));
    }
}
