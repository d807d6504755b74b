//! HTTP GETs in the background: the supervisor asks for what it wants to know and gets the last answer at once.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use serde_json::Value;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

/// Answer of one GET.
#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    /// Whether the status was 200 to 399: how a kubelet judges a probe.
    pub good: bool,
    /// Body, when it is JSON.
    pub body: Option<Value>,
}

/// Background GETs by name.
pub struct Polls {
    client: reqwest::Client,
    entries: BTreeMap<String, Entry>,
    sender: UnboundedSender<(String, Answer)>,
    receiver: UnboundedReceiver<(String, Answer)>,
}

#[derive(Default)]
struct Entry {
    asked: Option<Instant>,
    in_flight: bool,
    /// The last good JSON body.
    body: Option<Value>,
    /// The last answer, until it is taken.
    answer: Option<Answer>,
}

impl Polls {
    /// Nothing asked yet.
    pub fn new() -> reqwest::Result<Self> {
        // Loopback never goes through a proxy.
        let client = reqwest::Client::builder().no_proxy().timeout(Duration::from_secs(5)).build()?;
        let (sender, receiver) = unbounded_channel();
        Ok(Self { client, entries: BTreeMap::new(), sender, receiver })
    }

    /// Takes in the answers that have come.
    pub fn receive(&mut self) {
        while let Ok((name, answer)) = self.receiver.try_recv() {
            if let Some(entry) = self.entries.get_mut(&name) {
                entry.in_flight = false;
                if let Some(body) = answer.body.as_ref().filter(|_| answer.good) {
                    entry.body = Some(body.clone());
                }
                entry.answer = Some(answer);
            }
        }
    }

    /// Asks `url` under `name` every `period`; the last good JSON body.
    pub fn body(&mut self, name: &str, url: &str, period: Duration) -> Option<Value> {
        self.ask(name, url, period);
        self.entries.get(name)?.body.clone()
    }

    /// Asks `url` under `name` every `period`; each answer once.
    pub fn answer(&mut self, name: &str, url: &str, period: Duration) -> Option<Answer> {
        self.ask(name, url, period);
        self.entries.get_mut(name)?.answer.take()
    }

    /// Forgets what `pod` has said, whose names begin with its own: another process answers there now, or none.
    pub fn forget(&mut self, pod: &str) {
        let is_of_pod = |name: &str| name.strip_prefix(pod).is_some_and(|rest| rest.starts_with('/'));
        self.entries.retain(|name, _| !is_of_pod(name));
    }

    fn ask(&mut self, name: &str, url: &str, period: Duration) {
        let entry = self.entries.entry(name.to_owned()).or_default();
        if entry.in_flight || entry.asked.is_some_and(|asked| asked.elapsed() < period) {
            return;
        }
        entry.in_flight = true;
        entry.asked = Some(Instant::now());
        let request = self.client.get(url);
        let (sender, name) = (self.sender.clone(), name.to_owned());
        tokio::spawn(async move {
            let answer = match request.send().await {
                Ok(response) => {
                    let status = response.status();
                    Answer { good: status.is_success() || status.is_redirection(), body: response.json().await.ok() }
                }
                Err(_) => Answer { good: false, body: None },
            };
            // The supervisor is gone when nobody listens.
            let _ = sender.send((name, answer));
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_that_is_forgotten_takes_none_of_a_longer_name_with_it() {
        let mut polls = Polls::new().unwrap();
        for name in ["Pod/web-1/startup", "Pod/web-1/v1/model", "Pod/web-10/startup", "Pod/web-1@team/startup"] {
            polls.entries.insert(name.to_owned(), Entry::default());
        }
        polls.forget("Pod/web-1");
        assert!(polls.entries.keys().eq(["Pod/web-10/startup", "Pod/web-1@team/startup"]));
    }
}
