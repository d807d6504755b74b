//! A Hugging Face hub, or a server that speaks its protocol: revisions, lists, files. The transfer is ours: the crate `hf-hub` neither goes on
//! where a killed process was nor compares digests.

use carryon_crds::wire::is_commit;
use futures::{StreamExt as _, TryStreamExt as _};
use reqwest::Url;
use serde::Deserialize;

use super::args::{FetchArgs, Token};
use super::client::Client;
use super::error::FetchError;
use super::manifest::Origin;
use super::plan::{self, MAX_FILES, RemoteFile};
use super::range::{self, Rest};
use super::retry::patiently;
use super::source::{Listing, TOGETHER};

/// Bytes of a repository's description.
const MAX_DESCRIPTION: usize = 32 << 20;

/// A repository.
pub struct Hub {
    client: Client,
    endpoint: Url,
    token: Option<Token>,
    owner: String,
    name: String,
    revision: String,
    files: Vec<String>,
}

/// What the hub says of a revision.
#[derive(Deserialize)]
struct Description {
    sha: String,
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
}

impl Hub {
    /// `repository`: OWNER/NAME.
    ///
    /// # Errors
    /// It is none; the endpoint is no address.
    pub fn new(repository: &str, args: &FetchArgs, client: Client) -> Result<Self, FetchError> {
        let plain = |part: &str| {
            let allowed = |character: char| character.is_ascii_alphanumeric() || "-_.".contains(character);
            !part.is_empty() && part.len() <= 96 && !part.starts_with('.') && part.chars().all(allowed)
        };
        let bad = |what: String| FetchError::Configuration(what);
        let (owner, name) = repository.split_once('/').filter(|(owner, name)| plain(owner) && plain(name)).ok_or_else(|| {
            bad(format!("--hugging-face {repository:?} is no repository of a hub: it is OWNER/NAME, of letters, digits, -, _ and ."))
        })?;
        let endpoint = Url::parse(&args.endpoint).ok().filter(|url| matches!(url.scheme(), "http" | "https") && url.has_host());
        let endpoint = endpoint.ok_or_else(|| bad(format!("--endpoint {:?} is no https:// address", args.endpoint)))?;
        let (owner, name, files) = (owner.to_owned(), name.to_owned(), args.files.clone());
        Ok(Self {
            client,
            endpoint,
            token: args.token.clone().filter(|token| !token.is_empty()),
            owner,
            name,
            revision: args.revision.clone(),
            files,
        })
    }

    /// What is asked for.
    pub fn origin(&self) -> Origin {
        let source = format!("hf://{}/{}", self.owner, self.name);
        Origin { source, revision: Some(self.revision.clone()), files: self.files.clone() }
    }

    /// The chosen files, at `commit` or, where there is none yet, at the commit that the revision is now.
    ///
    /// # Errors
    /// No such repository, revision or files; no access.
    pub async fn list(&self, commit: Option<&str>) -> Result<Listing, FetchError> {
        let (what, Description { sha, siblings }) = self.describe(commit.unwrap_or(&self.revision)).await?;
        let names: Vec<String> = siblings.into_iter().map(|sibling| sibling.rfilename).collect();
        let chosen = plan::choose(&what, &names, &self.files)?;
        let asked = chosen.iter().map(|name| {
            let url = self.resolve(&sha, name);
            async move { patiently(|| range::describe(&self.client, name, &url, self.token.as_ref(), true)).await }
        });
        let files: Vec<RemoteFile> = futures::stream::iter(asked).buffered(TOGETHER).try_collect().await?;
        Ok(Listing { commit: Some(sha), files })
    }

    /// What the revision is now.
    ///
    /// # Errors
    /// No such repository or revision; no access; an answer that is none.
    pub async fn resolve_revision(&self) -> Result<String, FetchError> {
        let (what, Description { sha, .. }) = self.describe(&self.revision).await?;
        if is_commit(&sha) { Ok(sha) } else { Err(FetchError::Refused(format!("{what}: the hub says that its commit is {sha:?}"))) }
    }

    async fn describe(&self, revision: &str) -> Result<(String, Description), FetchError> {
        let url = self.address(&["api", "models", &self.owner, &self.name, "revision", revision]);
        let bytes = patiently(|| self.client.document(&url, self.token.as_ref(), MAX_DESCRIPTION)).await?;
        let what = format!("{}/{} at {revision}", self.owner, self.name);
        let refused = |cause: String| FetchError::Refused(format!("{what}: {cause}"));
        let description: Description =
            serde_json::from_slice(&bytes).map_err(|error| refused(format!("{} does not answer as a hub does: {error}", self.endpoint)))?;
        let sha = &description.sha;
        if sha.is_empty() || sha.len() > 64 || !sha.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(refused(format!("the hub says that its commit is {sha:?}")));
        }
        if description.siblings.len() > MAX_FILES {
            return Err(refused(format!("it has more than {MAX_FILES} files")));
        }
        Ok((what, description))
    }

    /// Bytes of a file from `offset` on.
    ///
    /// # Errors
    /// As [`range::read`].
    pub async fn read(&self, commit: &str, file: &RemoteFile, offset: u64) -> Result<Rest, FetchError> {
        range::read(&self.client, file, &self.resolve(commit, &file.name), self.token.as_ref(), offset).await
    }

    fn resolve(&self, commit: &str, name: &str) -> Url {
        let parts: Vec<&str> = [self.owner.as_str(), &self.name, "resolve", commit].into_iter().chain(name.split('/')).collect();
        self.address(&parts)
    }

    /// Each part is encoded: that a revision has a `/` does not make it two.
    fn address(&self, parts: &[&str]) -> Url {
        let mut url = self.endpoint.clone();
        url.path_segments_mut().expect("an https:// address has a path").pop_if_empty().extend(parts);
        url
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;

    #[derive(clap::Parser)]
    struct Command {
        #[command(flatten)]
        args: FetchArgs,
    }

    fn hub(repository: &str, endpoint: &str) -> Result<Hub, FetchError> {
        let command = ["x", "--hugging-face", repository, "--revision", "refs/pr/1", "--endpoint", endpoint, "--output", "o"];
        Hub::new(repository, &Command::try_parse_from(command).unwrap().args, Client::new(None).unwrap())
    }

    #[test]
    fn addresses_are_those_of_the_protocol() {
        let hub = hub("o/n.1", "https://mirror.example/hub/").unwrap();
        assert_eq!(hub.resolve("abc", "sub dir/a?.json").as_str(), "https://mirror.example/hub/o/n.1/resolve/abc/sub%20dir/a%3F.json");
        let revision = hub.address(&["api", "models", "o", "n", "revision", &hub.revision]);
        assert_eq!(revision.as_str(), "https://mirror.example/hub/api/models/o/n/revision/refs%2Fpr%2F1");
        assert_eq!(hub.origin().source, "hf://o/n.1");
    }

    #[test]
    fn what_is_no_repository_or_address_is_refused() {
        for (repository, endpoint) in
            [("gpt2", "https://h"), ("o/n/x", "https://h"), ("../n", "https://h"), ("o/n", "hub"), ("o/n", "file:///x")]
        {
            assert!(hub(repository, endpoint).is_err(), "{repository} {endpoint}");
        }
    }
}
