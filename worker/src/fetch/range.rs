//! Files behind plain addresses: what they are, and their bytes from some byte on.

use bytes::Bytes;
use futures::stream::BoxStream;
use hyper::header::{self, HeaderMap};
use hyper::{Method, StatusCode};
use reqwest::Url;

use super::args::Token;
use super::client::{Client, LINKED_ETAG, LINKED_SIZE, body, shown};
use super::error::FetchError;
use super::plan::RemoteFile;

/// The rest of a file.
pub struct Rest {
    /// Its first byte: the one asked for, or 0 from a source that knows no ranges.
    pub start: u64,
    /// The bytes.
    pub stream: BoxStream<'static, Result<Bytes, FetchError>>,
}

/// What marks this version of a file: the linked one of a hub, else the entity tag, else when it was changed.
pub fn etag(headers: &HeaderMap) -> Option<String> {
    let named = [LINKED_ETAG, header::ETAG, header::LAST_MODIFIED];
    let value = named.iter().find_map(|name| headers.get(name))?.to_str().ok()?;
    Some(value.trim_start_matches("W/").trim_matches('"').to_owned())
}

/// The digest that a mark is, where it is one.
pub fn sha256(etag: Option<&str>) -> Option<String> {
    etag.filter(|etag| etag.len() == 64 && etag.bytes().all(|byte| byte.is_ascii_hexdigit())).map(str::to_ascii_lowercase)
}

/// What the file `name` at `url` is, by its headers alone. `linked`: its mark may be a digest, as a hub's are.
///
/// # Errors
/// As [`Client::ask`]; no size.
pub async fn describe(client: &Client, name: &str, url: &Url, token: Option<&Token>, hub: bool) -> Result<RemoteFile, FetchError> {
    // Signed addresses are good for GET alone: without a hub, one byte is asked for.
    let (method, range) = if hub { (Method::HEAD, None) } else { (Method::GET, Some((0, 0))) };
    let answer = match client.ask(method, url, range, token, hub).await {
        // It has no first byte.
        Err(FetchError::Changed { .. }) => return Ok(RemoteFile { name: name.to_owned(), size: 0, etag: None, sha256: None }),
        answer => answer?,
    };
    let headers = &answer.headers;
    let number = |name: &header::HeaderName| headers.get(name)?.to_str().ok()?.trim().parse().ok();
    let size = match (number(&LINKED_SIZE), answer.response.status()) {
        (Some(size), _) => Some(size),
        (None, StatusCode::PARTIAL_CONTENT) => content_range(headers).and_then(|(_, _, total)| total),
        (None, _) => number(&header::CONTENT_LENGTH),
    };
    let size = size.ok_or_else(|| FetchError::Refused(format!("{} says nothing of its size", shown(url))))?;
    let etag = etag(headers);
    let sha256 = if hub { sha256(etag.as_deref()) } else { None };
    Ok(RemoteFile { name: name.to_owned(), size, etag, sha256 })
}

/// The bytes of `file` from `offset` on.
///
/// # Errors
/// As [`Client::ask`]; another file, or another range of it.
pub async fn read(client: &Client, file: &RemoteFile, url: &Url, token: Option<&Token>, offset: u64) -> Result<Rest, FetchError> {
    let changed = || FetchError::Changed { name: file.name.clone() };
    let range = (offset > 0).then(|| (offset, file.size.saturating_sub(1)));
    let answer = client.ask(Method::GET, url, range, token, false).await.map_err(|error| match error {
        FetchError::Changed { .. } => changed(),
        error => error,
    })?;
    if file.etag.is_some() && etag(&answer.headers) != file.etag {
        return Err(changed());
    }
    let partial = answer.response.status() == StatusCode::PARTIAL_CONTENT;
    let (start, total) = match content_range(&answer.headers) {
        Some((start, end, total)) if partial && start == offset && end.checked_add(1) == Some(file.size) => (start, total),
        None if !partial => (0, answer.headers.get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse().ok())),
        other => {
            let cause = format!("asked for bytes {offset} to the end of {}, its source sends {other:?}", file.size);
            return Err(FetchError::unreachable(file.name.clone(), cause));
        }
    };
    if total.is_some_and(|total| total != file.size) {
        return Err(changed());
    }
    Ok(Rest { start, stream: body(answer.response, file.name.clone()) })
}

/// First byte, last byte and, where it is known, size of the whole.
fn content_range(headers: &HeaderMap) -> Option<(u64, u64, Option<u64>)> {
    let (range, total) = headers.get(header::CONTENT_RANGE)?.to_str().ok()?.strip_prefix("bytes ")?.split_once('/')?;
    let (first, last) = range.split_once('-')?;
    let (first, last) = (first.parse().ok()?, last.parse().ok()?);
    let total = if total == "*" { None } else { Some(total.parse().ok()?) };
    (first <= last && total.is_none_or(|total| last < total)).then_some((first, last, total))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        pairs.iter().map(|&(name, value)| (header::HeaderName::from_static(name), value.parse().unwrap())).collect()
    }

    #[test]
    fn ranges_are_read_and_those_that_cannot_be_are_none() {
        let range = |text| content_range(&headers(&[("content-range", text)]));
        assert_eq!(range("bytes 5-9/10"), Some((5, 9, Some(10))));
        assert_eq!(range("bytes 5-9/*"), Some((5, 9, None)));
        for bad in ["bytes 9-5/10", "bytes 5-10/10", "bytes */10", "5-9/10", "bytes 5-9"] {
            assert_eq!(range(bad), None, "{bad}");
        }
    }

    #[test]
    fn the_linked_mark_of_a_hub_goes_before_that_of_its_redirect() {
        let digest = "a".repeat(64);
        let linked: &'static str = format!("\"{digest}\"").leak();
        assert_eq!(etag(&headers(&[("etag", "W/\"x\""), ("x-linked-etag", linked)])), Some(digest.clone()));
        assert_eq!(etag(&headers(&[("etag", "W/\"x\"")])), Some("x".to_owned()));
        assert_eq!(sha256(Some(&digest)), Some(digest));
        assert_eq!(sha256(Some("d41d8cd98f00b204e9800998ecf8427e")), None);
    }
}
