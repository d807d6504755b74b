//! From the addresses of a pool to its pods.

use std::fmt;
use std::net::SocketAddr;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use super::error::ClientError;

/// How long a resolved name is believed.
const BELIEVED: Duration = Duration::from_secs(5);

/// One pod of a pool.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Endpoint(SocketAddr);

impl Endpoint {
    /// URL of a route of this pod.
    pub(super) fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.0)
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(formatter)
    }
}

/// Host and port of a pool URL.
#[derive(Clone, Debug)]
struct Address {
    host: String,
    port: u16,
}

/// Resolves the addresses of a pool to its pods, again after a while: pods come and go.
#[derive(Debug)]
pub(super) struct Resolver {
    addresses: Vec<Address>,
    known: Mutex<Option<(Instant, Vec<Endpoint>)>>,
}

impl Resolver {
    /// Parses the URLs; nothing is resolved yet.
    pub(super) fn new(urls: &[String]) -> Result<Self, ClientError> {
        let error = |url: &str, reason: &str| ClientError::Address { url: url.to_owned(), reason: reason.to_owned() };
        let parse = |url: &String| {
            let parsed = reqwest::Url::parse(url).map_err(|cause| error(url, &cause.to_string()))?;
            match (parsed.scheme(), parsed.host_str(), parsed.port_or_known_default(), parsed.path()) {
                ("http", Some(host), Some(port), "/") => Ok(Address { host: host.trim_matches(['[', ']']).to_owned(), port }),
                _ => Err(error(url, "must have the form http://HOST:PORT")),
            }
        };
        let addresses = urls.iter().map(parse).collect::<Result<Vec<_>, _>>()?;
        match addresses.is_empty() {
            true => Err(error("", "no pool was named")),
            false => Ok(Self { addresses, known: Mutex::new(None) }),
        }
    }

    /// All pods, sorted.
    pub(super) async fn endpoints(&self) -> Result<Vec<Endpoint>, ClientError> {
        if let Ok(known) = self.known.lock()
            && let Some((at, endpoints)) = known.as_ref()
            && at.elapsed() < BELIEVED
        {
            return Ok(endpoints.clone());
        }
        let mut endpoints = Vec::new();
        for Address { host, port } in &self.addresses {
            let unreachable = |reason: String| ClientError::Unreachable { address: format!("{host}:{port}"), reason };
            let found: Vec<_> =
                tokio::net::lookup_host((host.as_str(), *port)).await.map_err(|cause| unreachable(cause.to_string()))?.collect();
            // A pod with addresses of both families is one pod.
            let old_family = found.iter().any(SocketAddr::is_ipv4);
            endpoints.extend(found.into_iter().filter(|address| address.is_ipv4() == old_family).map(Endpoint));
        }
        endpoints.sort_unstable();
        endpoints.dedup();
        if let Ok(mut known) = self.known.lock() {
            *known = Some((Instant::now(), endpoints.clone()));
        }
        Ok(endpoints)
    }

    /// Forgets what was resolved, after a pod did not answer.
    pub(super) fn forget(&self) {
        if let Ok(mut known) = self.known.lock() {
            *known = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn addresses_are_resolved_sorted_and_unique() {
        let urls = ["http://127.0.0.1:9", "http://127.0.0.1:8/", "http://127.0.0.1:9"].map(str::to_owned);
        let endpoints = Resolver::new(&urls).unwrap().endpoints().await.unwrap();
        assert_eq!(
            endpoints.iter().map(|endpoint| endpoint.url("/x")).collect::<Vec<_>>(),
            ["http://127.0.0.1:8/x", "http://127.0.0.1:9/x"]
        );
    }

    #[tokio::test]
    async fn localhost_is_one_pod() {
        assert_eq!(Resolver::new(&["http://localhost:9".to_owned()]).unwrap().endpoints().await.unwrap().len(), 1);
    }

    #[test]
    fn other_forms_are_refused_by_name() {
        for url in ["https://pool:1", "pool:8080", "http://pool:1/path", ""] {
            let error = Resolver::new(&[url.to_owned()]).unwrap_err().to_string();
            assert!(error.starts_with(&format!("pool address {url:?}: ")), "{error}");
        }
        assert!(Resolver::new(&[]).is_err());
    }
}
