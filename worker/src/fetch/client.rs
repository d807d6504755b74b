//! HTTP(S) to sources: authorities, proxies, redirects, and which answers are final.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use futures::StreamExt as _;
use futures::stream::BoxStream;
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use hyper::header::{self, HeaderMap, HeaderName, HeaderValue};
use hyper::{Method, Request, Response, StatusCode};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client as Pool;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use reqwest::Url;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;

use super::args::Token;
use super::dial::Dial;
use super::error::{FetchError, words};
use super::retry::retry_after;

/// How long a source may be silent, before its answer and within it.
pub const SILENCE: Duration = Duration::from_secs(60);
/// Redirects that are followed.
const HOPS: usize = 10;

/// Where a hub says what a file is, before it redirects to where the file lies.
pub const LINKED_ETAG: HeaderName = HeaderName::from_static("x-linked-etag");
/// Its bytes.
pub const LINKED_SIZE: HeaderName = HeaderName::from_static("x-linked-size");

/// Cheap to clone.
#[derive(Clone, Debug)]
pub struct Client(Pool<HttpsConnector<Dial>, Body>);

/// What a source answered, after redirects.
pub struct Answer {
    /// Headers of the answer; those that only a redirect had are among them.
    pub headers: HeaderMap,
    /// Status and body.
    pub response: Response<Incoming>,
}

impl Client {
    /// Trusts the system's authorities and those in the PEM file `ca_bundle`; takes HTTPS_PROXY and NO_PROXY from the environment.
    ///
    /// # Errors
    /// The file cannot be read, or holds no certificate.
    pub fn new(ca_bundle: Option<&Path>) -> Result<Self, FetchError> {
        let mut roots = rustls::RootCertStore::empty();
        roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        if let Some(path) = ca_bundle {
            let bad = |cause: String| FetchError::CaBundle { path: path.to_owned(), cause };
            let certificates = CertificateDer::pem_file_iter(path).and_then(Iterator::collect::<Result<Vec<_>, _>>);
            let certificates = certificates.map_err(|error| bad(error.to_string()))?;
            if certificates.is_empty() {
                return Err(bad("it holds no certificate".to_owned()));
            }
            certificates.into_iter().try_for_each(|certificate| roots.add(certificate)).map_err(|error| bad(error.to_string()))?;
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let versions = rustls::ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
        let config = versions.expect("the provider has the default versions").with_root_certificates(roots).with_no_client_auth();
        let connector = HttpsConnectorBuilder::new().with_tls_config(config).https_or_http().enable_http1().wrap_connector(Dial::default());
        Ok(Self(Pool::builder(TokioExecutor::new()).pool_timer(TokioTimer::new()).build(connector)))
    }

    /// One request, no redirect.
    ///
    /// # Errors
    /// No answer came.
    pub async fn send(&self, request: Request<Body>) -> Result<Response<Incoming>, FetchError> {
        let place = request.uri().authority().map_or_else(String::new, ToString::to_string);
        match tokio::time::timeout(SILENCE, self.0.request(request)).await {
            Ok(Ok(response)) => Ok(response),
            Ok(Err(error)) => {
                let words = words(&error);
                if words.contains("invalid peer certificate") {
                    let advice = "if an authority of your own signed it, name that by --ca-bundle";
                    return Err(FetchError::Untrusted(format!("{place} is not trusted ({words}): {advice}")));
                }
                Err(FetchError::unreachable(place, words))
            }
            Err(_) => Err(FetchError::unreachable(place, format!("no answer within {} s", SILENCE.as_secs()))),
        }
    }

    /// Asks for `url`, following redirects. `token` is shown to the first server only. `described`: a redirect that says what the file is
    /// ends it, for who wants no more than that.
    ///
    /// # Errors
    /// No answer, or one that is no success.
    pub async fn ask(
        &self,
        method: Method,
        url: &Url,
        range: Option<(u64, u64)>,
        token: Option<&Token>,
        described: bool,
    ) -> Result<Answer, FetchError> {
        let (mut at, mut linked) = (url.clone(), HeaderMap::new());
        for _ in 0..HOPS {
            let mut request = Request::builder().method(method.clone()).uri(at.as_str());
            request = request.header(header::ACCEPT_ENCODING, "identity");
            request = request.header(header::USER_AGENT, concat!("carryon-worker/", env!("CARGO_PKG_VERSION")));
            if let Some((first, last)) = range {
                request = request.header(header::RANGE, format!("bytes={first}-{last}"));
            }
            if let Some(token) = token.filter(|_| at.origin() == url.origin()) {
                request = request.header(header::AUTHORIZATION, token.bearer());
            }
            let request = request.body(Body::empty()).map_err(|error| FetchError::Refused(format!("{}: {error}", shown(&at))))?;
            let response = self.send(request).await?;
            for name in [LINKED_ETAG, LINKED_SIZE] {
                if let Some(value) = response.headers().get(&name) {
                    linked.entry(name).or_insert_with(|| value.clone());
                }
            }
            let next = response.headers().get(header::LOCATION).filter(|_| response.status().is_redirection());
            if let Some(next) = next.filter(|_| !(described && linked.contains_key(LINKED_ETAG))) {
                at = redirected(&at, next)?;
                continue;
            }
            if !response.status().is_redirection() {
                check(&response, url, at.origin() != url.origin())?;
            }
            let mut headers = response.headers().clone();
            headers.extend(linked);
            return Ok(Answer { headers, response });
        }
        Err(FetchError::Refused(format!("{} redirects more than {HOPS} times", shown(url))))
    }

    /// A small document, `limit` bytes at most.
    ///
    /// # Errors
    /// As [`Client::ask`]; a larger one.
    pub async fn document(&self, url: &Url, token: Option<&Token>, limit: usize) -> Result<Vec<u8>, FetchError> {
        let answer = self.ask(Method::GET, url, None, token, false).await?;
        let (mut stream, mut bytes) = (body(answer.response, shown(url)), Vec::new());
        while let Some(piece) = stream.next().await {
            bytes.extend_from_slice(&piece?);
            if bytes.len() > limit {
                return Err(FetchError::Refused(format!("{} is larger than {limit} bytes", shown(url))));
            }
        }
        Ok(bytes)
    }
}

/// The bytes of an answer to `what`; silence breaks it off.
pub fn body(response: Response<Incoming>, what: String) -> BoxStream<'static, Result<bytes::Bytes, FetchError>> {
    let pieces = response.into_body().into_data_stream();
    pieces.map(move |piece| piece.map_err(|error| FetchError::unreachable(what.clone(), words(&error)))).boxed()
}

/// An address without what may be secret in it.
pub fn shown(url: &Url) -> String {
    let mut url = url.clone();
    url.set_query(None);
    url.set_fragment(None);
    let _ = url.set_username("").and_then(|()| url.set_password(None));
    url.to_string()
}

fn redirected(from: &Url, to: &HeaderValue) -> Result<Url, FetchError> {
    let next = to.to_str().ok().and_then(|to| from.join(to).ok());
    let next = next.ok_or_else(|| FetchError::Refused(format!("{} redirects to {to:?}, which is no address", shown(from))))?;
    let safe = next.scheme() == "https" || (next.scheme() == "http" && from.scheme() == "http");
    if safe { Ok(next) } else { Err(FetchError::Refused(format!("{} redirects to {}, which is not safe", shown(from), shown(&next)))) }
}

/// Success, or which failure. `elsewhere`: of a server that another one named, by a link that may have run out.
fn check(response: &Response<Incoming>, url: &Url, elsewhere: bool) -> Result<(), FetchError> {
    let (status, headers, what) = (response.status(), response.headers(), shown(url));
    let said = ["x-error-message", "x-error-code"].iter().find_map(|&name| headers.get(name)).and_then(|value| value.to_str().ok());
    let said = said.map_or_else(String::new, |said| format!(" ({})", said.chars().take(200).collect::<String>()));
    let passing = [StatusCode::TOO_MANY_REQUESTS, StatusCode::REQUEST_TIMEOUT].contains(&status) || status.is_server_error();
    match status {
        _ if status.is_success() => Ok(()),
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN if !elsewhere => {
            let advice = "accept the licence there, if it has one, and give a token that may read it (for a hub: HF_TOKEN)";
            Err(FetchError::Denied(format!("token missing or without access to {what}: {status}{said}; {advice}")))
        }
        StatusCode::NOT_FOUND | StatusCode::GONE if !elsewhere => Err(FetchError::Missing(format!("there is no {what}: {status}{said}"))),
        StatusCode::RANGE_NOT_SATISFIABLE => Err(FetchError::Changed { name: what }),
        _ if passing || elsewhere => {
            let after = headers.get(header::RETRY_AFTER).and_then(|value| value.to_str().ok());
            let after = after.and_then(|value| retry_after(value, jiff::Timestamp::now()));
            Err(FetchError::Unreachable { what, cause: format!("{status}{said}"), after })
        }
        _ => Err(FetchError::Refused(format!("{what}: {status}{said}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn redirects_stay_encrypted_and_addresses_are_shown_without_secrets() {
        let from: Url = "https://hub.example/o/n".parse().unwrap();
        let to = |text: &'static str| redirected(&from, &HeaderValue::from_static(text)).map(|url| url.to_string());
        assert_eq!(to("/elsewhere").unwrap(), "https://hub.example/elsewhere");
        assert_eq!(to("https://cdn.example/x?sig=1").unwrap(), "https://cdn.example/x?sig=1");
        assert!(to("http://cdn.example/x").is_err() && to("file:///etc/passwd").is_err());
        assert_eq!(shown(&"https://user:word@host/a?sig=1#x".parse().unwrap()), "https://host/a");
    }
}
