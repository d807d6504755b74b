//! The files of a split.

use std::path::{Component, Path, PathBuf};

use glob::{MatchOptions, Pattern};

use super::lines::file_digest;
use crate::train::error::{DataError, TrainError};

/// A pattern names no hidden file, as in a shell; so the folders in which a kubelet keeps a ConfigMap's keys stay out.
const AS_A_SHELL: MatchOptions = MatchOptions { case_sensitive: true, require_literal_separator: true, require_literal_leading_dot: true };

/// Files with their content's digest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Files {
    /// Where they are, each once.
    pub paths: Vec<PathBuf>,
    /// Digest of the one, or of the digests of all, a line each.
    pub digest: String,
}

impl Files {
    /// Those that `named` are, names or patterns relative to `folder`: in that order, those of a pattern by their names.
    ///
    /// # Errors
    /// A name that leaves the folder, a file that is missing, a pattern that fits none.
    pub fn find(folder: &Path, named: &[String]) -> Result<Self, TrainError> {
        let mut paths = Vec::new();
        for name in named {
            let found = if is_pattern(name) { matching(folder, name)? } else { vec![inside(folder, name)?] };
            found.into_iter().for_each(|path| {
                if !paths.contains(&path) {
                    paths.push(path)
                }
            });
        }
        let digests = paths.iter().map(|path| file_digest(path)).collect::<Result<Vec<_>, _>>()?;
        let digest = match digests.as_slice() {
            [one] => one.clone(),
            several => carryon_crds::wire::digest(several.join("\n").as_bytes()),
        };
        Ok(Self { paths, digest })
    }

    /// Bytes of all.
    pub fn bytes(&self) -> u64 {
        self.paths.iter().map(|path| path.metadata().map_or(0, |metadata| metadata.len())).sum()
    }
}

fn is_pattern(name: &str) -> bool {
    name.contains(['*', '?', '['])
}

fn matching(folder: &Path, pattern: &str) -> Result<Vec<PathBuf>, TrainError> {
    let below = inside(Path::new(&Pattern::escape(&folder.to_string_lossy())), pattern)?;
    let unusable = |reason: String| TrainError::Configuration(format!("data.split: {pattern:?} is no pattern: {reason}"));
    let found = glob::glob_with(&below.to_string_lossy(), AS_A_SHELL).map_err(|error| unusable(error.to_string()))?;
    let mut files = Vec::new();
    for entry in found {
        let path = entry.map_err(|error| DataError::Read { path: error.path().to_owned(), cause: error.into() })?;
        if path.is_file() {
            files.push(path);
        }
    }
    match files.is_empty() {
        true => Err(DataError::NoMatch { path: folder.join(pattern) }.into()),
        false => Ok(files),
    }
}

/// A path inside the data folder.
fn inside(folder: &Path, path: &str) -> Result<PathBuf, TrainError> {
    let relative = Path::new(path);
    match relative.components().all(|part| matches!(part, Component::Normal(_) | Component::CurDir)) {
        true => Ok(folder.join(relative)),
        false => Err(TrainError::Configuration(format!("data.split: {path:?} leaves the data folder"))),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn found(folder: &Path, named: &[&str]) -> Result<String, String> {
        let named: Vec<String> = named.iter().map(|name| (*name).to_owned()).collect();
        let files = Files::find(folder, &named).map_err(|error| error.to_string())?;
        let name = |path: &PathBuf| path.strip_prefix(folder).unwrap().to_str().unwrap().to_owned();
        Ok(files.paths.iter().map(name).collect::<Vec<_>>().join(" "))
    }

    #[test]
    fn names_and_patterns_are_found_in_their_order_and_each_file_once() {
        let folder = tempfile::tempdir().unwrap();
        // Characters of the folder's own name are no pattern.
        let folder = folder.path().join("a[b]*");
        fs::create_dir_all(folder.join("sub/deep")).unwrap();
        for file in ["b.jsonl", "a.jsonl", ".hidden.jsonl", "sub/c.jsonl", "sub/deep/d.jsonl", "x.txt"] {
            fs::write(folder.join(file), file).unwrap();
        }
        fs::create_dir(folder.join("folder.jsonl")).unwrap();
        let found = |named: &[&str]| found(&folder, named);
        assert_eq!(found(&["b.jsonl", "*.jsonl"]).unwrap(), "b.jsonl a.jsonl");
        assert_eq!(found(&["*/*.jsonl", "[ab].jsonl", "?.txt"]).unwrap(), "sub/c.jsonl a.jsonl b.jsonl x.txt");
        assert_eq!(found(&["**/*.jsonl"]).unwrap(), "a.jsonl b.jsonl sub/c.jsonl sub/deep/d.jsonl");
        assert_eq!(found(&["./a.jsonl"]).unwrap(), "a.jsonl");
        let path = |name: &str| folder.join(name);
        assert_eq!(found(&["z*.jsonl"]).unwrap_err(), format!("no data file matches {:?}", path("z*.jsonl")));
        assert_eq!(found(&["z.jsonl"]).unwrap_err(), format!("data file {:?} does not exist", path("z.jsonl")));
        for leaves in ["../secret", "../*", "/etc/*", "sub/../../x"] {
            assert_eq!(found(&[leaves]).unwrap_err(), format!("data.split: {leaves:?} leaves the data folder"));
        }
        assert!(found(&["a[.jsonl"]).unwrap_err().starts_with("data.split: \"a[.jsonl\" is no pattern: "));
    }

    #[test]
    fn the_digest_is_that_of_the_one_file_and_knows_the_order_of_several() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("a"), "a").unwrap();
        fs::write(folder.path().join("b"), "b").unwrap();
        let digest =
            |named: &[&str]| Files::find(folder.path(), &named.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>()).unwrap().digest;
        assert_eq!(digest(&["a"]), carryon_crds::wire::digest(b"a"));
        assert_ne!(digest(&["a", "b"]), digest(&["b", "a"]));
        assert_eq!(digest(&["a", "b"]), digest(&["?"]));
    }
}
