//! Who asks how far a fetch is: the operator, over HTTP while it runs, and in the termination log once it has ended.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use axum::routing::get;
use axum::{Json, Router};
use carryon_crds::wire::FetchReport;
use tokio::net::TcpListener;

use crate::http::{self, Silence};

/// Bytes of a message at most: a termination log has 4096.
const MOST_WORDS: usize = 2048;

/// The last report.
#[derive(Debug, Default)]
pub struct Told(Mutex<FetchReport>);

impl Told {
    /// Another one.
    pub fn say(&self, report: FetchReport) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = report;
    }

    /// The last one.
    pub fn report(&self) -> FetchReport {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Answers at `address` until the runtime ends.
    ///
    /// # Errors
    /// The address is taken or not ours.
    pub async fn listen(self: &Arc<Self>, address: SocketAddr) -> std::io::Result<()> {
        let (listener, told) = (TcpListener::bind(address).await?, self.clone());
        let router = Router::new().route("/progress", get(async move || Json(told.report())));
        tokio::spawn(http::serve(listener, router, Silence::default(), std::future::pending()));
        Ok(())
    }

    /// Writes the last one where Kubernetes looks for last words. Best effort: nothing is left to report a failure to.
    pub fn last_words(&self, path: &Path) {
        let mut report = self.report();
        let cut = report.message.floor_char_boundary(MOST_WORDS);
        report.message.truncate(cut);
        let text = serde_json::to_vec(&report).expect("a report is plain data");
        if let Err(error) = std::fs::write(path, text) {
            tracing::warn!("failed to write the termination message to {path:?}: {error}");
        }
    }
}
