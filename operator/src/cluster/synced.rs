//! What the watches have come to: whether the stores can be relied on, and why not.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use kube::runtime::watcher::Error;
use tokio::sync::Notify;

use super::lock::lock;

/// How long a refusal is held against a watch: it is tried again at least every half minute, and says nothing when it goes on.
const REFUSED: Duration = Duration::from_secs(90);

/// The watches, by their namespace, which has no name when it is all, and what they watch.
#[derive(Default)]
pub struct Synced {
    watches: Mutex<BTreeMap<String, BTreeMap<String, Watch>>>,
    news: Notify,
}

#[derive(Default)]
struct Watch {
    /// It has shown everything once.
    listed: bool,
    /// It was refused before that: it may never show anything.
    refused: bool,
    /// What went wrong last, when nothing else has happened since.
    error: Option<(String, Instant)>,
}

impl Synced {
    /// Returns when everything was shown once that will be. A namespace that is closed keeps nobody from working in the others.
    pub async fn all(&self) {
        while !is_settled(lock(&self.watches).values()) {
            self.news.notified().await;
        }
    }

    /// Whether everything in a namespace was shown.
    pub fn has(&self, namespace: &str) -> bool {
        let watches = lock(&self.watches);
        watches.get("").or_else(|| watches.get(namespace)).is_some_and(is_listed)
    }

    /// What is not shown, and why, in a line each; nothing when all is well. A synced watch whose connection is lost comes back by itself; one
    /// that is refused needs somebody.
    pub fn missing(&self) -> Vec<String> {
        let words = |(what, watch): (&String, &Watch)| match &watch.error {
            Some((words, at)) if !watch.listed || at.elapsed() < REFUSED => Some(format!("{what}: {words}")),
            None if !watch.listed => Some(format!("{what}: not listed yet")),
            _ => None,
        };
        let watches = lock(&self.watches);
        let of = |namespace: &str| if namespace.is_empty() { String::new() } else { format!("namespace {namespace}: ") };
        watches.iter().flat_map(|(namespace, watches)| watches.iter().filter_map(words).map(move |words| of(namespace) + &words)).collect()
    }

    /// A watch has begun.
    pub fn waits(&self, namespace: &str, what: &str) {
        self.change(namespace, what, |watch| *watch = Watch::default());
    }

    /// It has shown everything.
    pub fn done(&self, namespace: &str, what: &str) {
        self.change(namespace, what, |watch| *watch = Watch { listed: true, ..Watch::default() });
    }

    /// It has met an error.
    pub fn failed(&self, namespace: &str, what: &str, error: &Error) {
        self.change(namespace, what, |watch| {
            watch.refused |= !watch.listed && is_refused(error);
            if !watch.listed || is_refused(error) {
                watch.error = Some((error.to_string(), Instant::now()));
            }
        });
    }

    fn change(&self, namespace: &str, what: &str, change: impl FnOnce(&mut Watch)) {
        change(lock(&self.watches).entry(namespace.to_owned()).or_default().entry(what.to_owned()).or_default());
        self.news.notify_one();
    }
}

fn is_listed(watches: &BTreeMap<String, Watch>) -> bool {
    watches.values().all(|watch| watch.listed)
}

/// Whether at least one namespace was shown, and each of the others was too or is closed.
fn is_settled<'a>(namespaces: impl Iterator<Item = &'a BTreeMap<String, Watch>>) -> bool {
    let (listed, rest): (Vec<_>, Vec<_>) = namespaces.partition(|watches| is_listed(watches));
    !listed.is_empty() && rest.iter().all(|watches| watches.values().any(|watch| watch.refused))
}

/// No right to see it, or no such type.
fn is_refused(error: &Error) -> bool {
    let status = match error {
        Error::InitialListFailed(kube::Error::Api(status)) | Error::WatchStartFailed(kube::Error::Api(status)) => status,
        Error::WatchError(status) => status,
        _ => return false,
    };
    [401, 403, 404].contains(&status.code)
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;
    use kube::core::Status;

    use super::*;

    fn refusal() -> Error {
        Error::InitialListFailed(kube::Error::Api(Status { code: 403, message: "forbidden".to_owned(), ..Status::default() }.boxed()))
    }

    #[test]
    fn a_namespace_that_is_closed_keeps_nobody_from_working_in_the_others() {
        let synced = Synced::default();
        let settled = || synced.all().now_or_never().is_some();
        for (namespace, what) in [("open", "jobs"), ("open", "pods"), ("closed", "jobs"), ("closed", "pods")] {
            synced.waits(namespace, what);
        }
        synced.done("open", "jobs");
        synced.failed("closed", "jobs", &refusal());
        assert!(!settled() && !synced.has("open"), "its pods are missing");
        synced.done("open", "pods");
        assert!(settled() && synced.has("open") && !synced.has("closed") && !synced.has("another"));
        let missing = synced.missing();
        assert!(missing[0].starts_with("namespace closed: jobs: ") && missing[0].contains("forbidden"), "{missing:?}");
        assert_eq!(missing[1..], ["namespace closed: pods: not listed yet"]);
        synced.done("closed", "jobs");
        synced.done("closed", "pods");
        assert!(synced.has("closed") && synced.missing().is_empty());
    }

    #[test]
    fn who_works_in_all_namespaces_needs_to_see_everything() {
        let synced = Synced::default();
        synced.waits("", "jobs");
        synced.waits("", "pods");
        synced.done("", "jobs");
        synced.failed("", "pods", &refusal());
        assert!(synced.all().now_or_never().is_none() && !synced.has("team"));
        synced.done("", "pods");
        assert!(synced.all().now_or_never().is_some() && synced.has("team"));
    }
}
