//! Connections to the API server. One that has gone dead without a word is given up: after a while without a byte on it.

use std::time::Duration;

use kube::{Client, Config};

/// Longest silence while an answer is awaited.
const ANSWER: Duration = Duration::from_secs(30);
/// Seconds after which the API server is to end a watch, which is then begun again where it was. Until then it may have nothing to say: it sends
/// no bookmark of a type in which nothing changes, where its etcd tells it of no progress.
pub const WATCH: u32 = 120;
/// Longest wait for a connection.
const CONNECT: Duration = Duration::from_secs(10);

/// Two ways to the API server.
#[derive(Clone)]
pub struct Clients {
    /// For requests that are answered.
    pub requests: Client,
    /// For watches.
    pub watches: Client,
}

impl Clients {
    /// Clients by a configuration, each made by `build`.
    pub fn new(config: &Config, build: impl Fn(Config) -> kube::Result<Client>) -> kube::Result<Self> {
        let client = |silence| {
            let mut config = config.clone();
            (config.connect_timeout, config.read_timeout, config.reset_reader_on_write) = (Some(CONNECT), Some(silence), true);
            build(config)
        };
        Ok(Self { requests: client(ANSWER)?, watches: client(Duration::from_secs(WATCH.into()) + ANSWER)? })
    }
}
