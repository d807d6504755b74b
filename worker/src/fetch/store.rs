//! Buckets: S3 and what speaks its protocol, Google's and Azure's. The clouds' credentials come from the environment, as their own tools take them.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use axum::body::Body;
use futures::{StreamExt as _, TryStreamExt as _};
use http_body_util::BodyExt as _;
use object_store::client::{HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpResponse, HttpResponseBody, HttpService};
use object_store::path::Path;
use object_store::{ClientOptions, GetOptions, GetRange, ObjectMeta, ObjectStore, ObjectStoreExt as _, RetryConfig};
use reqwest::Url;

use super::args::FetchArgs;
use super::client::{Client, shown};
use super::error::{FetchError, words};
use super::manifest::Origin;
use super::plan::{self, MAX_FILES, RemoteFile};
use super::range::Rest;
use super::retry::patiently;
use super::source::Listing;

/// An object, or all beneath a prefix.
pub struct Store {
    objects: Arc<dyn ObjectStore>,
    url: Url,
    prefix: Path,
    files: Vec<String>,
}

impl Store {
    /// Of an s3://, gs:// or az:// address.
    ///
    /// # Errors
    /// No bucket that can be asked.
    pub fn new(url: Url, args: &FetchArgs, client: Client) -> Result<Self, FetchError> {
        let bad = |error: object_store::Error| FetchError::Configuration(format!("{}: {}", shown(&url), words(&error)));
        // Ours come after these, and say what happens.
        let retry = RetryConfig { max_retries: 2, retry_timeout: Duration::from_secs(30), ..RetryConfig::default() };
        let objects: Arc<dyn ObjectStore> = match url.scheme() {
            "s3" | "s3a" => {
                let builder = object_store::aws::AmazonS3Builder::from_env().with_url(url.as_str());
                Arc::new(builder.with_http_connector(client).with_retry(retry).build().map_err(bad)?)
            }
            "gs" => {
                let builder = object_store::gcp::GoogleCloudStorageBuilder::from_env().with_url(url.as_str());
                Arc::new(builder.with_http_connector(client).with_retry(retry).build().map_err(bad)?)
            }
            _ => {
                let builder = object_store::azure::MicrosoftAzureBuilder::from_env().with_url(url.as_str());
                Arc::new(builder.with_http_connector(client).with_retry(retry).build().map_err(bad)?)
            }
        };
        let prefix = Path::from_url_path(url.path()).map_err(|error| bad(error.into()))?;
        Ok(Self { objects, url, prefix, files: args.files.clone() })
    }

    /// What is asked for.
    pub fn origin(&self) -> Origin {
        Origin { source: shown(&self.url), revision: None, files: self.files.clone() }
    }

    /// The one object, or those that are chosen beneath the prefix.
    ///
    /// # Errors
    /// Nothing there; no access.
    pub async fn list(&self) -> Result<Listing, FetchError> {
        if let Some(files) = patiently(|| self.single()).await? {
            return Ok(Listing { commit: None, files });
        }
        let objects = patiently(|| self.beneath()).await?;
        let source = shown(&self.url);
        if objects.is_empty() {
            return Err(FetchError::Missing(format!("there is nothing beneath {source}")));
        }
        let names: Vec<String> = objects.iter().map(|file| file.name.clone()).collect();
        let chosen = plan::choose(&source, &names, &self.files)?;
        let files = objects.into_iter().filter(|file| chosen.binary_search(&file.name).is_ok()).collect();
        Ok(Listing { commit: None, files })
    }

    /// Bytes of a file from `offset` on.
    ///
    /// # Errors
    /// No answer, or one that is no success.
    pub async fn read(&self, file: &RemoteFile, offset: u64) -> Result<Rest, FetchError> {
        let single = self.prefix.filename().filter(|_| !self.url.path().ends_with('/'));
        let location = match single.filter(|name| plan::together(name).contains(&file.name)) {
            Some(_) => self.beside(&file.name),
            None => self.prefix.parts().chain(Path::from(file.name.as_str()).parts()).collect(),
        };
        let if_match = file.etag.clone();
        let options = GetOptions { if_match, range: Some(GetRange::Bounded(offset..file.size)), ..GetOptions::default() };
        let result = self.objects.get_opts(&location, options).await.map_err(|error| self.failure(&file.name, &error))?;
        if result.meta.size != file.size || result.range != (offset..file.size) {
            return Err(FetchError::Changed { name: file.name.clone() });
        }
        let name = file.name.clone();
        let stream = result.into_stream().map_err(move |error| FetchError::unreachable(name.clone(), words(&error))).boxed();
        Ok(Rest { start: offset, stream })
    }

    /// The object that has the prefix as its whole name, and those that it is one with.
    async fn single(&self) -> Result<Option<Vec<RemoteFile>>, FetchError> {
        let Some(name) = self.prefix.filename().filter(|_| !self.url.path().ends_with('/')) else { return Ok(None) };
        let mut files = Vec::new();
        for part in plan::together(name) {
            match self.objects.head(&self.beside(&part)).await {
                Ok(object) => {
                    plan::check_name(&part)?;
                    files.push(described(part, object));
                }
                Err(object_store::Error::NotFound { .. }) if part == name => return Ok(None),
                Err(error) => return Err(self.failure(&part, &error)),
            }
        }
        Ok(Some(files))
    }

    /// Where an object lies that has this name in place of the prefix's last part.
    fn beside(&self, name: &str) -> Path {
        let parts: Vec<_> = self.prefix.parts().collect();
        parts[..parts.len().saturating_sub(1)]
            .iter()
            .cloned()
            .chain(Path::from(name).parts().map(|part| part.as_ref().to_owned().into()))
            .collect()
    }

    async fn beneath(&self) -> Result<Vec<RemoteFile>, FetchError> {
        let mut objects = self.objects.list(Some(&self.prefix));
        let mut files = Vec::new();
        while let Some(object) = objects.try_next().await.map_err(|error| self.failure("its list", &error))? {
            let Some(parts) = object.location.prefix_match(&self.prefix) else { continue };
            let name = parts.map(|part| part.as_ref().to_owned()).collect::<Vec<_>>().join("/");
            if files.len() == MAX_FILES {
                return Err(FetchError::Refused(format!("there are more than {MAX_FILES} objects beneath {}", shown(&self.url))));
            }
            // A name that is the prefix's alone is what some tools write for a folder.
            if !name.is_empty() {
                files.push(described(name, object));
            }
        }
        Ok(files)
    }

    fn failure(&self, what: &str, error: &object_store::Error) -> FetchError {
        use object_store::Error;
        let (place, words) = (shown(&self.url), one_line(&words(error)));
        let denied = || {
            let advice = "give the bucket's credentials in the environment, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY";
            FetchError::Denied(format!("credentials missing or without access to {what} in {place}: {words}; {advice}"))
        };
        match (error, status(&words)) {
            (Error::Precondition { .. }, _) => FetchError::Changed { name: what.to_owned() },
            (Error::PermissionDenied { .. } | Error::Unauthenticated { .. }, _) | (_, Some(401 | 403)) => denied(),
            (Error::NotFound { .. }, _) => FetchError::Missing(format!("there is no {what} in {place}: {words}")),
            (_, Some(status)) if (300..500).contains(&status) && ![408, 429].contains(&status) => {
                FetchError::Refused(format!("{what} in {place}: {words}"))
            }
            _ => FetchError::unreachable(format!("{what} in {place}"), words),
        }
    }
}

/// The status that the library's words of a list tell: its own type for that is not public.
fn status(words: &str) -> Option<u16> {
    let (_, after) = words.split_once("non-2xx status code: ")?;
    after.get(..3)?.parse().ok()
}

/// Answers in XML as one line that is not too long.
fn one_line(words: &str) -> String {
    words.split_whitespace().collect::<Vec<_>>().join(" ").chars().take(500).collect()
}

fn described(name: String, object: ObjectMeta) -> RemoteFile {
    RemoteFile { name, size: object.size, etag: object.e_tag, sha256: None }
}

impl HttpConnector for Client {
    fn connect(&self, _: &ClientOptions) -> object_store::Result<HttpClient> {
        Ok(HttpClient::new(self.clone()))
    }
}

#[async_trait]
impl HttpService for Client {
    async fn call(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let failed = |error: FetchError| {
            let kind = if error.is_refusal() { HttpErrorKind::Unknown } else { HttpErrorKind::Connect };
            HttpError::new(kind, error)
        };
        let response = self.send(request.map(Body::new)).await.map_err(failed)?;
        Ok(response.map(|body| HttpResponseBody::new(body.map_err(|error| HttpError::new(HttpErrorKind::Interrupted, error)))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_status_of_a_refused_list_is_found() {
        let words = "Generic S3 error: Error performing GET http://x in 2 ms - Server returned non-2xx status code: 403 Forbidden: <Error>";
        assert_eq!(status(words), Some(403));
        assert_eq!(status("Generic S3 error: connection refused"), None);
        assert_eq!(one_line("a\n  b"), "a b");
    }
}
