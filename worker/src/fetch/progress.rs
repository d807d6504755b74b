//! How far a fetch is: a bar on a terminal, else a line every few seconds; and a small file that others may read.

use std::convert::Infallible;
use std::fs::{self, OpenOptions};
use std::io::{self, IsTerminal as _, Write as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use carryon_crds::wire::FetchReport;
use indicatif::{DecimalBytes, HumanDuration, ProgressBar, ProgressStyle};

use super::error::FetchError;
use super::tell::Told;
use crate::files;

/// The file, in the model's folder.
pub const REPORT: &str = ".fetch.json";
/// Between two versions of the file.
const INTERVAL: Duration = Duration::from_secs(1);
/// Between two lines when there is no terminal.
const LINE_INTERVAL: Duration = Duration::from_secs(5);
/// Share of the newest second in the rate.
const NEWEST: f64 = 0.2;
/// Bytes of the file, when it is read.
const MAX_REPORT: u64 = 64 << 10;

/// The report at `path`, if there is one.
pub fn read(path: &Path) -> Option<FetchReport> {
    let short = fs::metadata(path).is_ok_and(|metadata| metadata.len() <= MAX_REPORT);
    if short { serde_json::from_slice(&fs::read(path).ok()?).ok() } else { None }
}

/// Counted by those who fetch, told by [`Meter::tell`].
pub struct Meter {
    path: PathBuf,
    commit: Option<String>,
    told: Arc<Told>,
    /// Why a source is asked again, since no byte came.
    trouble: Mutex<Option<String>>,
    bytes: AtomicU64,
    total: AtomicU64,
    bar: Option<ProgressBar>,
    rate: Mutex<Rate>,
}

impl Meter {
    /// Of a fetch of `commit` into `folder`.
    pub fn new(folder: &Path, commit: Option<String>, told: Arc<Told>) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let style = ProgressStyle::with_template("{prefix:>10} {bar:30} {msg}").unwrap_or_else(|_| ProgressStyle::default_bar());
            ProgressBar::new(0).with_style(style.progress_chars("━━─")).with_prefix("fetching")
        });
        let (path, rate, trouble) = (folder.join(REPORT), Mutex::default(), Mutex::default());
        Self { path, commit, told, trouble, bytes: 0.into(), total: 0.into(), bar, rate }
    }

    /// The model has `total` bytes; what is there is counted anew.
    pub fn begin(&self, total: u64) {
        self.total.store(total, Ordering::Relaxed);
        self.bytes.store(0, Ordering::Relaxed);
        *lock(&self.rate) = Rate::default();
    }

    /// `count` bytes more are there.
    pub fn add(&self, count: u64) {
        self.bytes.fetch_add(count, Ordering::Relaxed);
        *lock(&self.trouble) = None;
    }

    /// A source has broken off: that is told until a byte comes.
    pub fn trouble(&self, words: String) {
        *lock(&self.trouble) = Some(words);
    }

    /// `count` bytes were thrown away.
    pub fn take_back(&self, count: u64) {
        self.bytes.fetch_sub(count, Ordering::Relaxed);
    }

    /// Bytes that were found: they say nothing of the rate.
    pub fn found(&self, count: u64) {
        self.add(count);
        lock(&self.rate).last += count;
    }

    /// Bytes that have yet to come.
    pub fn remaining(&self) -> u64 {
        self.total.load(Ordering::Relaxed).saturating_sub(self.bytes.load(Ordering::Relaxed))
    }

    /// Tells as long as it is polled.
    pub async fn tell(&self) -> Infallible {
        let (mut ticks, mut line) = (tokio::time::interval(INTERVAL), Instant::now());
        ticks.tick().await;
        loop {
            let begun = Instant::now();
            ticks.tick().await;
            let (bytes, total) = (self.bytes.load(Ordering::Relaxed), self.total.load(Ordering::Relaxed));
            let rate = lock(&self.rate).measure(bytes, begun.elapsed().as_secs_f64());
            let eta = eta(total.saturating_sub(bytes), rate);
            let message = words(bytes, total, rate, eta);
            if let Some(bar) = &self.bar {
                bar.set_length(total);
                bar.set_position(bytes);
                bar.set_message(message.clone());
            } else if line.elapsed() >= LINE_INTERVAL {
                tracing::info!("fetching: {message}");
                line = Instant::now();
            }
            match lock(&self.trouble).clone() {
                Some(words) => self.write(self.report("retrying", None, words)),
                None => self.write(self.report("fetching", eta, message)),
            }
        }
    }

    /// The last words, or those before the first byte.
    pub fn say(&self, state: &str, message: String) {
        if let Some(bar) = &self.bar
            && state != "listing"
        {
            bar.finish_and_clear();
        }
        self.write(self.report(state, None, message));
    }

    /// The report of how a fetch ended that did not succeed.
    pub fn failed(&self, error: &FetchError) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        self.write(FetchReport { failure: error.failure(), ..self.report(ended(error), None, error.to_string()) });
    }

    fn report(&self, state: &str, eta_seconds: Option<u64>, message: String) -> FetchReport {
        let (bytes, total) = (self.bytes.load(Ordering::Relaxed), self.total.load(Ordering::Relaxed));
        FetchReport { state: state.to_owned(), bytes, total, eta_seconds, message, commit: self.commit.clone(), failure: None }
    }

    /// Nobody's model depends on the report. A full volume has room for it where the last one is.
    fn write(&self, report: FetchReport) {
        let bytes = serde_json::to_vec(&report).expect("a report is plain data");
        self.told.say(report);
        let written = tokio::task::block_in_place(|| files::write_atomic(&self.path, &bytes).or_else(|_| overwrite(&self.path, &bytes)));
        if let Err(error) = written {
            tracing::debug!("failed to write {:?}: {error}", self.path);
        }
    }
}

/// `stopped` or `failed`.
pub fn ended(error: &FetchError) -> &'static str {
    if matches!(error, FetchError::Stopped) { "stopped" } else { "failed" }
}

fn lock<T>(shared: &Mutex<T>) -> MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

fn overwrite(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).open(path)?;
    file.write_all(bytes)?;
    file.set_len(bytes.len() as u64)
}

/// Bytes a second, smoothed.
#[derive(Default)]
struct Rate {
    last: u64,
    smooth: Option<f64>,
}

impl Rate {
    fn measure(&mut self, bytes: u64, seconds: f64) -> f64 {
        let now = bytes.saturating_sub(self.last) as f64 / seconds.max(1e-3);
        self.last = bytes;
        let smooth = self.smooth.map_or(now, |before| (1.0 - NEWEST) * before + NEWEST * now);
        self.smooth = Some(smooth);
        smooth
    }
}

/// Seconds that `remaining` bytes take, where that can be told.
fn eta(remaining: u64, rate: f64) -> Option<u64> {
    (rate >= 1.0).then(|| (remaining as f64 / rate).ceil() as u64)
}

fn words(bytes: u64, total: u64, rate: f64, eta: Option<u64>) -> String {
    let left = eta.map_or_else(String::new, |seconds| format!(" · {} left", HumanDuration(Duration::from_secs(seconds))));
    format!("{} of {} · {}/s{left}", DecimalBytes(bytes), DecimalBytes(total), DecimalBytes(rate as u64))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_smooth_and_gives_the_time_that_is_left() {
        let mut rate = Rate::default();
        assert_eq!(rate.measure(1000, 1.0), 1000.0);
        assert_eq!(rate.measure(1000, 1.0), 800.0);
        // Bytes that were thrown away are no negative rate.
        assert_eq!(rate.measure(0, 1.0), 640.0);
        assert_eq!(eta(6400, 640.0), Some(10));
        assert_eq!(eta(6400, 0.0), None);
        assert_eq!(words(5_000_000, 10_000_000, 1e6, Some(5)), "5.00 MB of 10.00 MB · 1.00 MB/s · 5 seconds left");
    }
}
