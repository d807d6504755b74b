//! Clients of a gateway that never stop asking.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use carryon_tests::cluster::TestCluster;
use futures::StreamExt as _;
use serde_json::{Value, json};

/// How requests went.
#[derive(Clone, Debug, Default)]
pub struct Outcomes {
    /// The texts of those that were answered whole.
    pub answers: Vec<String>,
    /// The words of the errors by which others were refused or broken off.
    pub failures: Vec<String>,
}

/// So many clients, each with one request at a time.
pub struct Load {
    ends: Arc<AtomicBool>,
    begun: Arc<AtomicUsize>,
    outcomes: Arc<Mutex<Outcomes>>,
    clients: Vec<tokio::task::JoinHandle<()>>,
}

impl Load {
    pub fn start(cluster: &TestCluster, url: &str, model: &str, clients: usize, tokens: u32) -> Self {
        let (ends, begun, outcomes) = (Arc::<AtomicBool>::default(), Arc::<AtomicUsize>::default(), Arc::<Mutex<Outcomes>>::default());
        let clients = (0..clients).map(|_| {
            let (url, model, ends, begun, outcomes) = (url.to_owned(), model.to_owned(), ends.clone(), begun.clone(), outcomes.clone());
            cluster.spawn(async move {
                while !ends.load(Ordering::Relaxed) {
                    let answer = stream(&url, &model, tokens, || _ = begun.fetch_add(1, Ordering::Relaxed)).await;
                    let mut outcomes = outcomes.lock().unwrap();
                    match answer {
                        Ok(text) => outcomes.answers.push(text),
                        Err(error) => outcomes.failures.push(words(error)),
                    }
                }
            })
        });
        let clients = clients.collect();
        Self { ends, begun, outcomes, clients }
    }

    /// Streams of which a first piece has come.
    pub fn begun(&self) -> usize {
        self.begun.load(Ordering::Relaxed)
    }

    pub fn answered(&self) -> usize {
        self.outcomes.lock().unwrap().answers.len()
    }

    /// No more requests; how all went.
    pub fn stop(self, cluster: &TestCluster) -> Outcomes {
        self.ends.store(true, Ordering::Relaxed);
        cluster.block_on(futures::future::join_all(self.clients));
        std::mem::take(&mut *self.outcomes.lock().unwrap())
    }
}

/// Streams one completion, over a connection of its own.
pub async fn ask(url: &str, model: &str, tokens: u32) -> Result<String, String> {
    stream(url, model, tokens, || ()).await.map_err(words)
}

type Error = Box<dyn std::error::Error + Send + Sync>;

fn words(error: Error) -> String {
    format!("{error:#?}")
}

async fn stream(url: &str, model: &str, tokens: u32, begins: impl Fn()) -> Result<String, Error> {
    let client = reqwest::Client::builder().no_proxy().timeout(std::time::Duration::from_secs(60)).build()?;
    let asked =
        json!({ "model": model, "prompt": "Tom has 3 apples and buys 4 more.", "max_tokens": tokens, "temperature": 0, "stream": true });
    let answer = client.post(format!("{url}/completions")).json(&asked).send().await?;
    if !answer.status().is_success() {
        return Err(format!("{}: {}", answer.status(), answer.text().await?).into());
    }
    let (mut pieces, mut bytes) = (answer.bytes_stream(), Vec::new());
    while let Some(piece) = pieces.next().await {
        if bytes.is_empty() {
            begins();
        }
        bytes.extend(piece?);
    }
    let (mut text, mut done) = (String::new(), false);
    for line in String::from_utf8(bytes)?.lines().filter_map(|line| line.strip_prefix("data: ")) {
        if line == "[DONE]" {
            done = true;
            continue;
        }
        let event: Value = serde_json::from_str(line)?;
        if !event["error"].is_null() {
            return Err(event["error"].to_string().into());
        }
        text += event["choices"][0]["text"].as_str().unwrap_or_default();
    }
    if done { Ok(text) } else { Err("the stream broke off".into()) }
}
