//! What the watches have come to: whether the stores can be relied on, and why not.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use kube::runtime::watcher::Error;
use tokio::sync::Notify;

use super::lock::lock;

/// How long a refusal is held against a watch: it is tried again at least every half minute, and says nothing when it goes on.
const REFUSED: Duration = Duration::from_secs(90);

/// The watches, by what they watch.
#[derive(Default)]
pub struct Synced {
    watches: Mutex<BTreeMap<String, Watch>>,
    listed: Notify,
}

#[derive(Default)]
struct Watch {
    /// It has shown everything once.
    listed: bool,
    /// What went wrong last, when nothing else has happened since.
    error: Option<(String, Instant)>,
}

impl Synced {
    /// Returns when every watch has shown everything once.
    pub async fn all(&self) {
        while !lock(&self.watches).values().all(|watch| watch.listed) {
            self.listed.notified().await;
        }
    }

    /// What is not shown, and why, in a line each; nothing when all is well. A synced watch whose connection is lost comes back by itself; one
    /// that is refused needs somebody.
    pub fn missing(&self) -> Vec<String> {
        let words = |name: &String, watch: &Watch| match &watch.error {
            Some((words, at)) if !watch.listed || at.elapsed() < REFUSED => Some(format!("{name}: {words}")),
            None if !watch.listed => Some(format!("{name}: not listed yet")),
            _ => None,
        };
        lock(&self.watches).iter().filter_map(|(name, watch)| words(name, watch)).collect()
    }

    /// A watch has begun.
    pub fn waits(&self, name: &str) {
        lock(&self.watches).insert(name.to_owned(), Watch::default());
    }

    /// It has shown everything.
    pub fn done(&self, name: &str) {
        lock(&self.watches).insert(name.to_owned(), Watch { listed: true, error: None });
        self.listed.notify_one();
    }

    /// It has met an error.
    pub fn failed(&self, name: &str, error: &Error) {
        let mut watches = lock(&self.watches);
        let watch = watches.entry(name.to_owned()).or_default();
        if !watch.listed || is_refused(error) {
            watch.error = Some((error.to_string(), Instant::now()));
        }
    }
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
