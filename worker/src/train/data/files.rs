//! The files of a split.

use std::io::ErrorKind;
use std::path::{Component, Path, PathBuf};

use carryon_crds::job::Split;
use glob::{MatchOptions, Pattern};

use super::dataset::{self, Part};
use super::lines::file_digest;
use crate::train::error::{DataError, TrainError};
use crate::train::stop::Stop;

/// A pattern names no hidden file, as in a shell; so the folders in which a kubelet keeps a ConfigMap's keys stay out.
const AS_A_SHELL: MatchOptions = MatchOptions { case_sensitive: true, require_literal_separator: true, require_literal_leading_dot: true };

/// Levels of folders that `**` looks through.
const DEPTH: usize = 32;

/// Files with their content's digest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Files {
    /// Where they are, each once.
    pub paths: Vec<PathBuf>,
    /// Digest of the one, or of the digests of all, a line each.
    pub digest: String,
}

impl Files {
    /// Those that `named` are, names or patterns relative to `folder`: in that order, those of a pattern by their names. A folder means those of
    /// its files that are `part`.
    ///
    /// # Errors
    /// A name that leaves the folder, a file that is missing, a pattern that fits none; the wish to stop.
    pub fn find(folder: &Path, named: &[String], part: Part, stop: &Stop) -> Result<Self, TrainError> {
        let mut paths = Vec::new();
        for name in named {
            let path = inside(folder, name)?;
            // A file of that very name is meant by it.
            let found = match () {
                () if path.is_dir() => dataset::files(&path, part)?,
                () if Split::is_pattern(name) && !path.is_file() => matching(folder, name)?,
                () => vec![path],
            };
            found.into_iter().for_each(|path| {
                if !paths.contains(&path) {
                    paths.push(path)
                }
            });
        }
        let digests = paths.iter().map(|path| file_digest(path, stop)).collect::<Result<Vec<_>, _>>()?;
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

fn matching(folder: &Path, pattern: &str) -> Result<Vec<PathBuf>, TrainError> {
    let plain = pattern.trim_start_matches("./");
    let unusable = |reason: String| TrainError::Configuration(format!("data.split: {pattern:?} is no pattern: {reason}"));
    let walk = Walk {
        folder,
        pattern: Pattern::new(plain).map_err(|error| unusable(error.to_string()))?,
        depth: if plain.contains("**") { DEPTH } else { plain.split('/').count() },
    };
    let mut files = Vec::new();
    walk.below(Path::new(""), 1, &mut files)?;
    files.sort();
    match files.is_empty() {
        true => Err(DataError::NoMatch { path: folder.join(pattern) }.into()),
        false => Ok(files),
    }
}

/// A look at all files that a pattern may mean.
struct Walk<'a> {
    folder: &'a Path,
    pattern: Pattern,
    /// Levels of folders.
    depth: usize,
}

impl Walk<'_> {
    fn below(&self, relative: &Path, level: usize, files: &mut Vec<PathBuf>) -> Result<(), TrainError> {
        let here = self.folder.join(relative);
        let entries = match std::fs::read_dir(&here) {
            Ok(entries) => entries,
            // As in a shell, what is somebody else's, such as lost+found, is passed over.
            Err(error) if level > 1 && error.kind() == ErrorKind::PermissionDenied => return Ok(()),
            Err(cause) => return Err(DataError::Read { path: here, cause }.into()),
        };
        for entry in entries.flatten() {
            // A name that is no text is none that a pattern could mean.
            let Some(name) = entry.file_name().to_str().map(str::to_owned) else { continue };
            let (path, found) = (relative.join(&name), entry.path());
            if found.is_dir() && level < self.depth && !name.starts_with('.') {
                self.below(&path, level + 1, files)?;
            } else if self.pattern.matches_path_with(&path, AS_A_SHELL) && found.is_file() {
                files.push(found);
            }
        }
        Ok(())
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
    use std::os::unix::ffi::OsStrExt as _;

    use super::*;

    fn files(folder: &Path, named: &[&str]) -> Result<Files, TrainError> {
        Files::find(folder, &named.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>(), Part::Train, &Stop::default())
    }

    fn found(folder: &Path, named: &[&str]) -> Result<String, String> {
        let name = |path: &PathBuf| path.strip_prefix(folder).unwrap().to_str().unwrap().to_owned();
        let files = files(folder, named).map_err(|error| error.to_string())?;
        Ok(files.paths.iter().map(name).collect::<Vec<_>>().join(" "))
    }

    #[test]
    fn no_file_is_read_when_someone_asks_to_stop() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("a"), "a").unwrap();
        let stop = Stop::default();
        stop.set();
        assert!(matches!(Files::find(folder.path(), &["a".to_owned()], Part::Train, &stop), Err(TrainError::Stopped { .. })));
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
        // What is no text, and a name that looks like a pattern.
        fs::write(folder.join(std::ffi::OsStr::from_bytes(b"r\xE9sum\xE9.jsonl")), "").unwrap();
        fs::write(folder.join("data[1].jsonl"), "").unwrap();
        assert_eq!(found(&["data[1].jsonl", "[ab].jsonl"]).unwrap(), "data[1].jsonl a.jsonl b.jsonl");
        assert_eq!(found(&["*.jsonl"]).unwrap(), "a.jsonl b.jsonl data[1].jsonl");
        assert!(found(&["a[.jsonl"]).unwrap_err().starts_with("data.split: \"a[.jsonl\" is no pattern: "));
    }

    #[test]
    fn the_digest_is_that_of_the_one_file_and_knows_the_order_of_several() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("a"), "a").unwrap();
        fs::write(folder.path().join("b"), "b").unwrap();
        let digest = |named: &[&str]| files(folder.path(), named).unwrap().digest;
        assert_eq!(digest(&["a"]), carryon_crds::wire::digest(b"a"));
        assert_ne!(digest(&["a", "b"]), digest(&["b", "a"]));
        assert_eq!(digest(&["a", "b"]), digest(&["?"]));
    }
}
