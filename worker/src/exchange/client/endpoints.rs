//! From the addresses of a pool to its pods.

use std::collections::HashMap;
use std::fmt;
use std::net::SocketAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::error::ClientError;

/// How long a resolved name is believed.
const BELIEVED: Duration = Duration::from_secs(5);
/// Longest wait for the addresses of a name.
const RESOLVED: Duration = Duration::from_secs(10);
/// How long the others are asked first after a pod could not be reached.
const AVOIDED: Duration = Duration::from_secs(10);

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
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Address {
    host: String,
    port: u16,
}

impl Address {
    async fn resolve(&self) -> Result<Vec<Endpoint>, ClientError> {
        let Self { host, port } = self;
        let unreachable = |reason: String| ClientError::Unreachable { address: format!("{host}:{port}"), reason };
        let found = tokio::time::timeout(RESOLVED, tokio::net::lookup_host((host.as_str(), *port))).await;
        let found = found.map_err(|_| unreachable(format!("its name is not resolved within {RESOLVED:?}")))?;
        let found: Vec<_> = found.map_err(|cause| unreachable(cause.to_string()))?.collect();
        // A pod with addresses of both families is one pod.
        let old_family = found.iter().any(SocketAddr::is_ipv4);
        Ok(found.into_iter().filter(|address| address.is_ipv4() == old_family).map(Endpoint).collect())
    }
}

/// Resolves the addresses of a pool to its pods, again after a while: pods come and go.
#[derive(Debug)]
pub(super) struct Resolver {
    pub(super) addresses: Vec<Address>,
    known: Mutex<Option<(Instant, Vec<Endpoint>)>>,
    /// Pods that could not be reached, and when.
    avoided: Mutex<HashMap<Endpoint, Instant>>,
}

impl Resolver {
    /// Parses the URLs, of which one argument may hold several with commas between them; nothing is resolved yet.
    pub(super) fn new(urls: &[String]) -> Result<Self, ClientError> {
        let error = |url: &str, reason: &str| ClientError::Address { url: url.to_owned(), reason: reason.to_owned() };
        let parse = |url: &str| {
            let parsed = reqwest::Url::parse(url).map_err(|cause| error(url, &cause.to_string()))?;
            match (parsed.scheme(), parsed.host_str(), parsed.port_or_known_default(), parsed.path()) {
                ("http", Some(host), Some(port), "/") => Ok(Address { host: host.trim_matches(['[', ']']).to_owned(), port }),
                _ => Err(error(url, "must have the form http://HOST:PORT")),
            }
        };
        let addresses = urls.iter().flat_map(|urls| urls.split(',')).map(parse).collect::<Result<Vec<_>, _>>()?;
        match addresses.is_empty() {
            true => Err(error("", "no pool was named")),
            false => Ok(Self { addresses, known: Mutex::default(), avoided: Mutex::default() }),
        }
    }

    /// All pods, sorted.
    pub(super) async fn endpoints(&self) -> Result<Vec<Endpoint>, ClientError> {
        if let Some((at, endpoints)) = lock(&self.known).as_ref()
            && at.elapsed() < BELIEVED
        {
            return Ok(endpoints.clone());
        }
        let (mut endpoints, mut unresolved) = (Vec::new(), None);
        for resolved in futures::future::join_all(self.addresses.iter().map(Address::resolve)).await {
            match resolved {
                Ok(found) => endpoints.extend(found),
                Err(error) => unresolved = Some(error),
            }
        }
        // A name that does not resolve takes nobody from the pods of the others.
        if let (true, Some(error)) = (endpoints.is_empty(), unresolved) {
            return Err(error);
        }
        endpoints.sort_unstable();
        endpoints.dedup();
        *lock(&self.known) = Some((Instant::now(), endpoints.clone()));
        Ok(endpoints)
    }

    /// The pod for the call number `turn`, of those that suit where there are any: each in its turn, one that could not be reached lately only
    /// when no other is known.
    pub(super) async fn next(&self, turn: usize, suits: impl Fn(&Endpoint) -> bool) -> Result<Endpoint, ClientError> {
        let mut all = self.endpoints().await?;
        if all.iter().any(&suits) {
            all.retain(suits);
        }
        let mut avoided = lock(&self.avoided);
        avoided.retain(|_, since| since.elapsed() < AVOIDED);
        let (good, bad): (Vec<_>, Vec<_>) = all.into_iter().partition(|endpoint| !avoided.contains_key(endpoint));
        let choice = if good.is_empty() { bad } else { good };
        let nobody = || ClientError::Unreachable { address: "pool".to_owned(), reason: "its name resolves to no pod".to_owned() };
        choice.get(turn % choice.len().max(1)).cloned().ok_or_else(nobody)
    }

    /// Lets the others be asked first for a while.
    pub(super) fn avoid(&self, endpoint: &Endpoint) {
        lock(&self.avoided).insert(endpoint.clone(), Instant::now());
    }

    /// Forgets what was resolved, after a pod did not answer.
    pub(super) fn forget(&self) {
        *lock(&self.known) = None;
    }
}

/// Every change leaves a whole value, so a poisoned lock is harmless.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
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
    async fn a_pod_that_could_not_be_reached_is_asked_when_there_is_no_other() {
        let resolver = Resolver::new(&["http://127.0.0.1:8", "http://127.0.0.1:9"].map(str::to_owned)).unwrap();
        let asked = async || [resolver.next(0, |_| true).await.unwrap().to_string(), resolver.next(1, |_| true).await.unwrap().to_string()];
        assert_eq!(asked().await, ["127.0.0.1:8", "127.0.0.1:9"]);
        let pods = resolver.endpoints().await.unwrap();
        resolver.avoid(&pods[0]);
        assert_eq!(asked().await, ["127.0.0.1:9", "127.0.0.1:9"]);
        resolver.avoid(&pods[1]);
        assert_eq!(asked().await, ["127.0.0.1:8", "127.0.0.1:9"]);
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
