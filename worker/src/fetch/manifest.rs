//! What a folder holds, and of what source: written when a fetch has chosen its files, after each file, and last when all are there.

use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::error::FetchError;
use super::folder::{self, MANIFEST};
use super::plan::RemoteFile;
use crate::files;

/// Bytes of a manifest.
const MAX_BYTES: u64 = 64 << 20;

/// What was asked for. Where it is fetched from, such as a mirror, is no part of it, nor are secrets.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    /// `hf://OWNER/NAME`, or an address without what follows its path.
    pub source: String,
    /// Branch, tag or commit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revision: Option<String>,
    /// Patterns of the files; none when they are those that a model needs.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub files: Vec<String>,
}

/// A file of the folder.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// As its source describes it.
    #[serde(flatten)]
    pub remote: RemoteFile,
    /// Digest of what was written, hexadecimal; absent until all of it is there and checked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verified: Option<String>,
}

/// Content of the file `.fetch-manifest.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Of what.
    #[serde(flatten)]
    pub origin: Origin,
    /// What the revision was resolved to, once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub commit: Option<String>,
    /// Whether every file is there.
    pub complete: bool,
    /// By name.
    pub entries: Vec<Entry>,
}

impl Manifest {
    /// That of `folder`, if it has one.
    ///
    /// # Errors
    /// It cannot be read, or is none.
    pub fn read(folder: &Path) -> Result<Option<Self>, FetchError> {
        let path = folder.join(MANIFEST);
        let size = match fs::metadata(&path) {
            Ok(metadata) => metadata.len(),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(FetchError::file("read", path)(error)),
        };
        let broken = |cause: String| FetchError::Configuration(format!("{path:?} is no manifest ({cause}): empty the folder"));
        if size > MAX_BYTES {
            return Err(broken(format!("it has {size} bytes")));
        }
        let bytes = fs::read(&path).map_err(FetchError::file("read", &path))?;
        let manifest: Self = serde_json::from_slice(&bytes).map_err(|error| broken(error.to_string()))?;
        // Paths are made of these names, and somebody else may have written them.
        manifest.entries.iter().try_for_each(|entry| super::plan::check_name(&entry.remote.name))?;
        Ok(Some(manifest))
    }

    /// Writes it into `folder`.
    ///
    /// # Errors
    /// The folder takes no file.
    pub fn write(&self, folder: &Path) -> Result<(), FetchError> {
        let path = folder.join(MANIFEST);
        let bytes = serde_json::to_vec_pretty(self).expect("a manifest is plain data");
        files::write_atomic(&path, &bytes).map_err(FetchError::file("write", path))
    }

    /// Whether `folder` has all of it.
    pub fn is_whole(&self, folder: &Path) -> bool {
        self.complete && self.entries.iter().all(|Entry { remote, .. }| folder::size(&folder.join(&remote.name)) == Some(remote.size))
    }

    /// Whether there are weights that `config.json` speaks of.
    pub fn has_weights(&self) -> bool {
        self.entries.iter().any(|entry| entry.remote.name.ends_with(".safetensors"))
    }

    /// Bytes of all files.
    pub fn bytes(&self) -> u64 {
        self.entries.iter().map(|entry| entry.remote.size).sum()
    }

    /// That a folder's manifest is of what is asked for.
    ///
    /// # Errors
    /// It is of something else, and says of what.
    pub fn expect(&self, origin: &Origin, folder: &Path) -> Result<(), FetchError> {
        if self.origin == *origin {
            return Ok(());
        }
        let words = |origin: &Origin| {
            let revision = origin.revision.as_ref().map_or_else(String::new, |revision| format!(" at {revision}"));
            let files = if origin.files.is_empty() { String::new() } else { format!(" ({})", origin.files.join(", ")) };
            format!("{}{revision}{files}", origin.source)
        };
        let (found, asked) = (words(&self.origin), words(origin));
        Err(FetchError::Configuration(format!("{folder:?} is the folder of {found}: empty it, or choose another one for {asked}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manifest() -> Manifest {
        let origin = Origin { source: "hf://o/n".to_owned(), revision: Some("main".to_owned()), files: vec![] };
        let remote = RemoteFile { name: "sub/a".to_owned(), size: 3, etag: Some("e".to_owned()), sha256: None };
        Manifest { origin, commit: Some("c".to_owned()), complete: true, entries: vec![Entry { remote, verified: Some("f".to_owned()) }] }
    }

    #[test]
    fn a_manifest_is_whole_when_all_files_have_their_sizes() {
        let folder = tempfile::tempdir().unwrap();
        let written = manifest();
        written.write(folder.path()).unwrap();
        let read = Manifest::read(folder.path()).unwrap().unwrap();
        assert_eq!(read, written);
        assert!(!read.is_whole(folder.path()));
        fs::create_dir(folder.path().join("sub")).unwrap();
        fs::write(folder.path().join("sub/a"), "abc").unwrap();
        assert!(read.is_whole(folder.path()));
        assert!(!Manifest { complete: false, ..read }.is_whole(folder.path()));
    }

    #[test]
    fn another_source_is_named_and_names_that_lead_elsewhere_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let mut manifest = manifest();
        let other = Origin { revision: Some("v2".to_owned()), ..manifest.origin.clone() };
        let error = manifest.expect(&other, folder.path()).unwrap_err().to_string();
        assert!(error.contains("hf://o/n at main") && error.contains("hf://o/n at v2"), "{error}");
        manifest.entries[0].remote.name = "../a".to_owned();
        manifest.write(folder.path()).unwrap();
        assert!(Manifest::read(folder.path()).is_err());
        fs::write(folder.path().join(MANIFEST), "{").unwrap();
        assert!(Manifest::read(folder.path()).unwrap_err().to_string().contains("empty the folder"));
    }
}
