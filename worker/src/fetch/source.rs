//! Where models come from: one way to list files and to read them, whatever is behind.

use reqwest::Url;

use super::args::FetchArgs;
use super::client::Client;
use super::error::FetchError;
use super::hub::Hub;
use super::manifest::Origin;
use super::plan::RemoteFile;
use super::range::Rest;
use super::store::Store;
use super::web::Web;

/// Questions that are asked of one source at once.
pub const TOGETHER: usize = 4;

/// What a source has for us.
#[derive(Debug)]
pub struct Listing {
    /// What a hub's revision is resolved to.
    pub commit: Option<String>,
    /// The files that are chosen.
    pub files: Vec<RemoteFile>,
}

/// One of the kinds of sources.
pub enum Source {
    /// A repository of a hub.
    Hub(Hub),
    /// A web server.
    Web(Web),
    /// A bucket.
    Store(Store),
}

impl Source {
    /// The one that the arguments name.
    ///
    /// # Errors
    /// Arguments that name none.
    pub fn new(args: &FetchArgs) -> Result<Self, FetchError> {
        let client = Client::new(args.ca_bundle.as_deref())?;
        let Some(address) = &args.url else {
            return Ok(Self::Hub(Hub::new(args.hugging_face.as_deref().unwrap_or_default(), args, client)?));
        };
        let url = Url::parse(address).map_err(|error| FetchError::Configuration(format!("--url {address:?}: {error}")))?;
        match url.scheme() {
            "http" | "https" => Ok(Self::Web(Web::new(url, args, client)?)),
            "s3" | "s3a" | "gs" | "az" | "azure" | "abfs" | "abfss" | "adl" => Ok(Self::Store(Store::new(url, args, client)?)),
            other => Err(FetchError::Configuration(format!("--url {address:?}: {other}:// is none of https://, s3://, gs:// and az://"))),
        }
    }

    /// What is asked for.
    pub fn origin(&self) -> Origin {
        match self {
            Self::Hub(hub) => hub.origin(),
            Self::Web(web) => web.origin(),
            Self::Store(store) => store.origin(),
        }
    }

    /// The commit that a hub's revision is now.
    ///
    /// # Errors
    /// As [`Source::list`]; another source has no revisions.
    pub async fn resolve(&self) -> Result<String, FetchError> {
        match self {
            Self::Hub(hub) => hub.resolve_revision().await,
            Self::Web(_) | Self::Store(_) => Err(FetchError::Configuration("--revision is for a hub".to_owned())),
        }
    }

    /// The files that are chosen, of `commit` where one is known already.
    ///
    /// # Errors
    /// No access, no such files, no answer.
    pub async fn list(&self, commit: Option<&str>) -> Result<Listing, FetchError> {
        match self {
            Self::Hub(hub) => hub.list(commit).await,
            Self::Web(web) => web.list().await,
            Self::Store(store) => store.list().await,
        }
    }

    /// Bytes of a file from `offset` on, once: who calls tries again.
    ///
    /// # Errors
    /// No answer; another file than the one that was listed.
    pub async fn read(&self, commit: Option<&str>, file: &RemoteFile, offset: u64) -> Result<Rest, FetchError> {
        match self {
            Self::Hub(hub) => hub.read(commit.unwrap_or_default(), file, offset).await,
            Self::Web(web) => web.read(file, offset).await,
            Self::Store(store) => store.read(file, offset).await,
        }
    }
}
