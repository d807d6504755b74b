//! A web server: one file, or a folder with a model's files. It has no list, so a folder is asked for what a model consists of.

use std::collections::{BTreeMap, BTreeSet};

use futures::{StreamExt as _, TryStreamExt as _};
use reqwest::Url;
use serde::Deserialize;

use super::args::FetchArgs;
use super::client::{Client, shown};
use super::error::FetchError;
use super::manifest::Origin;
use super::plan::{self, INDEX, MAX_FILES, RemoteFile};
use super::range::{self, Rest};
use super::retry::patiently;
use super::source::{Listing, TOGETHER};

/// Names that a folder is asked for; it may lack each of them.
const ASKED: &[&str] = &[
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "merges.txt",
    "vocab.json",
    "model.safetensors",
    INDEX,
];
/// Bytes of the file that names the shards.
const MAX_INDEX: usize = 64 << 20;

/// A file, or a folder where the address ends with `/`.
pub struct Web {
    client: Client,
    url: Url,
    files: Vec<String>,
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl Web {
    /// Of an http(s) address.
    ///
    /// # Errors
    /// Patterns, where there is no list that they could choose from.
    pub fn new(url: Url, args: &FetchArgs, client: Client) -> Result<Self, FetchError> {
        let folder = url.path().ends_with('/');
        if let Some(pattern) = args.files.iter().find(|name| !folder || glob::Pattern::escape(name) != **name) {
            let why =
                if folder { "a web server has no list of files to choose from: give names" } else { "the address is that of one file" };
            return Err(FetchError::Configuration(format!("--files {pattern:?}: {why}")));
        }
        Ok(Self { client, url, files: args.files.clone() })
    }

    /// What is asked for.
    pub fn origin(&self) -> Origin {
        Origin { source: shown(&self.url), revision: None, files: self.files.clone() }
    }

    /// The files that are there.
    ///
    /// # Errors
    /// A file that was named is missing; a folder has no weights.
    pub async fn list(&self) -> Result<Listing, FetchError> {
        if !self.url.path().ends_with('/') {
            let names = plan::together(&self.name()?).into_iter().collect();
            return Ok(Listing { commit: None, files: self.describe_all(names).await? });
        }
        if !self.files.is_empty() {
            self.files.iter().try_for_each(|name| plan::check_name(name))?;
            return Ok(Listing { commit: None, files: self.describe_all(self.files.iter().cloned().collect()).await? });
        }
        let mut names: BTreeSet<String> = ASKED.iter().map(|&name| name.to_owned()).collect();
        let there = futures::stream::iter(names.clone()).map(async |name| match self.describe(&name).await {
            Ok(file) => Ok(Some(file)),
            // Whatever it says of a file that it lacks: only the weights must be there.
            Err(error) if error.is_refusal() && !matches!(error, FetchError::Untrusted(_)) => {
                tracing::debug!("{error}");
                Ok(None)
            }
            Err(error) => Err(error),
        });
        let there: Vec<Option<RemoteFile>> = there.buffered(TOGETHER).try_collect().await?;
        let mut files: Vec<RemoteFile> = there.into_iter().flatten().collect();
        if files.iter().any(|file| file.name == INDEX) {
            let shards = self.shards().await?;
            names.clear();
            names.extend(shards.into_iter().filter(|shard| !files.iter().any(|file| file.name == *shard)));
            files.extend(self.describe_all(names).await?);
        } else if !files.iter().any(|file| file.name == "model.safetensors") {
            let why =
                "has neither model.safetensors nor model.safetensors.index.json: name its files by --files, or give the address of one";
            return Err(FetchError::Missing(format!("{} {why}", shown(&self.url))));
        }
        Ok(Listing { commit: None, files })
    }

    /// Bytes of a file from `offset` on.
    ///
    /// # Errors
    /// As [`range::read`].
    pub async fn read(&self, file: &RemoteFile, offset: u64) -> Result<Rest, FetchError> {
        range::read(&self.client, file, &self.address(&file.name), None, offset).await
    }

    async fn shards(&self) -> Result<BTreeSet<String>, FetchError> {
        let url = self.address(INDEX);
        let bytes = patiently(|| self.client.document(&url, None, MAX_INDEX)).await?;
        let index: Index = serde_json::from_slice(&bytes).map_err(|error| FetchError::Refused(format!("{}: {error}", shown(&url))))?;
        let shards: BTreeSet<String> = index.weight_map.into_values().collect();
        if shards.len() > MAX_FILES {
            return Err(FetchError::Refused(format!("{} names more than {MAX_FILES} files", shown(&url))));
        }
        shards.iter().try_for_each(|name| plan::check_name(name))?;
        Ok(shards)
    }

    async fn describe(&self, name: &str) -> Result<RemoteFile, FetchError> {
        let url = self.address(name);
        patiently(|| range::describe(&self.client, name, &url, None, false)).await
    }

    async fn describe_all(&self, names: BTreeSet<String>) -> Result<Vec<RemoteFile>, FetchError> {
        futures::stream::iter(names).map(async |name| self.describe(&name).await).buffered(TOGETHER).try_collect().await
    }

    /// Name of the one file.
    fn name(&self) -> Result<String, FetchError> {
        let last = self.url.path_segments().and_then(Iterator::last).unwrap_or_default();
        let name = object_store::path::Path::from_url_path(last).map_err(|error| FetchError::Refused(format!("{last:?}: {error}")))?;
        plan::check_name(name.as_ref())?;
        Ok(name.to_string())
    }

    fn address(&self, name: &str) -> Url {
        let mut url = self.url.clone();
        if url.path().ends_with('/') {
            url.path_segments_mut().expect("an https:// address has a path").pop_if_empty().extend(name.split('/'));
        } else if plan::together(name).len() > 1 {
            url.path_segments_mut().expect("an https:// address has a path").pop().push(name);
        }
        url
    }
}
