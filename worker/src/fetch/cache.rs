//! A folder of many models: which of its folders is the one that is asked for, and the link that leads there.
//!
//! The name says source and commit, so that all who want the same model share one folder. The link is there before the first byte: who starts
//! anew goes on with the commit that it began with, though its branch has moved on.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use carryon_crds::wire::{digest, is_commit};

use super::args::FetchArgs;
use super::error::FetchError;
use super::manifest::{Manifest, Origin};
use super::plan;
use super::source::Source;

/// Characters of a name that tell people what it is.
const READABLE: usize = 120;
/// Hexadecimal characters of it that tell it from all others.
const DISTINCT: usize = 12;

/// What is fetched, and the folder that it is fetched into.
pub struct Place {
    /// The arguments, with the commit for the revision where there is one.
    pub args: FetchArgs,
    /// The folder.
    pub folder: PathBuf,
}

impl Place {
    /// That of a cache is found by what the revision is resolved to: as the arguments say, as the link does, or as the hub does now.
    ///
    /// # Errors
    /// The hub does not resolve it; the link cannot be made.
    pub async fn find(args: &FetchArgs) -> Result<Self, FetchError> {
        let mut args = args.clone();
        let Some(cache) = args.cache.clone() else {
            let folder = args.output.clone().unwrap_or_default();
            return Ok(Self { args, folder });
        };
        if args.hugging_face.is_some() && !is_commit(&args.revision) {
            let given = args.commit.clone().filter(|commit| is_commit(commit));
            args.revision = match given.or_else(|| begun(args.link.as_deref()?, &args)) {
                Some(commit) => commit,
                None => Source::new(&args)?.resolve().await?,
            };
        }
        let folder = cache.join(name(&Source::new(&args)?.origin()));
        let place = Self { args, folder };
        place.link(&place.folder)?;
        Ok(place)
    }

    /// The commit, of a hub.
    pub fn commit(&self) -> Option<String> {
        (self.args.hugging_face.is_some() && is_commit(&self.args.revision)).then(|| self.args.revision.clone())
    }

    /// Lets the link lead to the model that is there now.
    ///
    /// # Errors
    /// The link cannot be made.
    pub fn finish(&self, manifest: &Manifest) -> Result<(), FetchError> {
        let names = || manifest.entries.iter().map(|entry| entry.remote.name.as_str());
        let folder = names().any(|name| name.ends_with(".safetensors"));
        let mut files = names().filter(|name| !folder && name.ends_with(".gguf") && plan::is_first(name));
        match (files.next(), files.next()) {
            (Some(file), None) => self.link(&self.folder.join(file)),
            _ => Ok(()),
        }
    }

    fn link(&self, target: &Path) -> Result<(), FetchError> {
        let Some(link) = &self.args.link else { return Ok(()) };
        if fs::read_link(link).is_ok_and(|there| there == target) {
            return Ok(());
        }
        let folder = link.parent().unwrap_or(Path::new("."));
        fs::create_dir_all(folder).map_err(FetchError::file("create", folder))?;
        let new = folder.join(".fetch.link");
        let _ = fs::remove_file(&new);
        symlink(target, &new).and_then(|()| fs::rename(&new, link)).map_err(FetchError::file("link", link))
    }
}

/// The commit of the folder that the link leads into already, if it is one of the same source.
fn begun(link: &Path, args: &FetchArgs) -> Option<String> {
    let target = fs::read_link(link).ok()?;
    let folder = target.ancestors().find(|folder| folder.parent() == args.cache.as_deref())?.file_name()?.to_str()?;
    let commit = folder.split("--").find(|part| is_commit(part))?.to_owned();
    let same = FetchArgs { revision: commit.clone(), ..args.clone() };
    (name(&Source::new(&same).ok()?.origin()) == folder).then_some(commit)
}

/// `OWNER--NAME--COMMIT--DIGEST`, or an address with `--` for its `/`, and the digest of what was asked for.
fn name(origin: &Origin) -> String {
    let (scheme, path) = origin.source.split_once("://").unwrap_or(("", &origin.source));
    let prefix = if scheme == "hf" { String::new() } else { format!("{scheme}--") };
    let plain = |character: char| if character.is_ascii_alphanumeric() || "._".contains(character) { character } else { '-' };
    let parts = path.split('/').filter(|part| !part.is_empty()).map(|part| part.chars().map(plain).collect::<String>());
    let mut readable = prefix + &parts.collect::<Vec<_>>().join("--");
    readable.truncate(READABLE);
    let commit = origin.revision.iter().map(|commit| format!("--{commit}")).collect::<String>();
    let whole = digest(&serde_json::to_vec(origin).expect("an origin is plain data"));
    let distinct: String = whole.trim_start_matches("sha256:").chars().take(DISTINCT).collect();
    format!("{readable}{commit}--{distinct}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn origin(source: &str, revision: Option<&str>, files: &[&str]) -> Origin {
        let files = files.iter().map(|&file| file.to_owned()).collect();
        Origin { source: source.to_owned(), revision: revision.map(str::to_owned), files }
    }

    #[test]
    fn a_folder_is_named_by_source_commit_and_files() {
        let commit = "0123456789abcdef0123456789abcdef01234567";
        let hub = name(&origin("hf://o/n.1", Some(commit), &[]));
        assert!(hub.starts_with(&format!("o--n.1--{commit}--")) && hub.len() == format!("o--n.1--{commit}--").len() + DISTINCT, "{hub}");
        assert_ne!(hub, name(&origin("hf://o/n.1", Some(commit), &["*.gguf"])));
        let bucket = name(&origin("s3://bucket/a b/../c/", None, &[]));
        assert!(bucket.starts_with("s3--bucket--a-b--..--c--") && !bucket.contains('/'), "{bucket}");
        assert!(name(&origin(&format!("https://h/{}", "x".repeat(3000)), None, &[])).len() < 200);
    }
}
