//! What a person and the operator see of a run: a bar on a terminal, else one line a step; a snapshot for the endpoint.

use std::io::IsTerminal as _;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use carryon_crds::wire::Progress;
use indicatif::{ProgressBar, ProgressStyle};

use crate::train::checkpoint::State;
use crate::train::metrics::{EvaluationLine, StepLine, finite};

/// Lines of a phase come at most this often when there is no terminal.
const LINE_INTERVAL: Duration = Duration::from_secs(5);

/// What the trainer is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Waiting for another trainer to leave the output folder.
    Waiting,
    /// Waiting for the pool's description.
    Connecting,
    /// Reading and tokenising data.
    Encoding,
    /// Asking the pool for the evaluation samples' states.
    Caching,
    /// Optimizer steps.
    Training,
    /// Measuring held-out samples.
    Evaluating,
    /// Writing head and report.
    Writing,
    /// All is written.
    Done,
}

impl Phase {
    /// Name on the wire.
    pub fn name(self) -> &'static str {
        match self {
            Self::Waiting => "waiting",
            Self::Connecting => "connecting",
            Self::Encoding => "encoding",
            Self::Caching => "caching",
            Self::Training => "training",
            Self::Evaluating => "evaluating",
            Self::Writing => "writing",
            Self::Done => "done",
        }
    }
}

/// Shared with the endpoint.
pub type Snapshot = Arc<Mutex<Progress>>;

/// Tells how the run goes.
pub struct Console {
    snapshot: Snapshot,
    bar: Option<ProgressBar>,
    phase: Phase,
    unit: &'static str,
    last_line: Instant,
    /// The seed that is the turn of, from 0, and how many there are.
    seeds: (u64, u64),
    /// Seconds a step took lately, smoothed, for the estimate of what remains.
    pace: Option<f64>,
}

impl Default for Console {
    fn default() -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new(0);
            bar.enable_steady_tick(Duration::from_millis(200));
            bar
        });
        let phase = Phase::Connecting;
        let snapshot = Arc::new(Mutex::new(Progress { phase: phase.name().to_owned(), ..Progress::default() }));
        Self { snapshot, bar, phase, unit: "", last_line: Instant::now(), seeds: (0, 1), pace: None }
    }
}

impl Console {
    /// What the endpoint reads.
    pub fn snapshot(&self) -> Snapshot {
        self.snapshot.clone()
    }

    /// Begins a phase of `total` units (0: unknown).
    pub fn phase(&mut self, phase: Phase, total: u64, unit: &'static str) {
        self.locked().phase = phase.name().to_owned();
        let changed = self.phase != phase;
        (self.phase, self.unit) = (phase, unit);
        if let Some(bar) = &self.bar {
            let template = match (phase, total) {
                (Phase::Training, _) => "{prefix:>10} {bar:30} {pos}/{len} steps · {msg}",
                (_, 0) => "{prefix:>10} {spinner} {msg}",
                _ => "{prefix:>10} {bar:30} {pos}/{len} {msg}",
            };
            bar.set_style(ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("━━─"));
            bar.set_prefix(phase.name());
            bar.set_message(if phase == Phase::Training { "" } else { unit });
            bar.set_length(total);
            bar.set_position(0);
        } else if changed && phase != Phase::Evaluating {
            tracing::info!("{}{}", phase.name(), if total > 0 { format!(": {total} {unit}") } else { String::new() });
        }
    }

    /// `done` of `total` units of the phase.
    pub fn advance(&mut self, done: u64, total: u64) {
        if let Some(bar) = &self.bar {
            bar.set_length(total.max(done));
            bar.set_position(done);
        } else if self.last_line.elapsed() >= LINE_INTERVAL {
            self.last_line = Instant::now();
            tracing::info!("{} {done}/{total} {}", self.phase.name(), self.unit);
        }
    }

    /// It is the turn of seed `number`, from 0, of `count`: what is told of steps are those of all seeds.
    pub fn seed(&mut self, number: usize, count: usize) {
        self.seeds = (number as u64, count as u64);
    }

    /// `step` of `total` of this seed as steps of all seeds.
    fn of_all(&self, step: u64, total: u64) -> (u64, u64) {
        let (number, count) = self.seeds;
        (number.saturating_mul(total).saturating_add(step), count.saturating_mul(total))
    }

    /// Shows what an earlier start has reached.
    pub fn resumed(&mut self, state: &State) {
        let steps = self.of_all(state.step, state.total_steps);
        let mut progress = self.locked();
        (progress.step, progress.total_steps) = steps;
        progress.train_loss = state.train_loss.and_then(finite);
        progress.eval_loss = state.eval_loss.and_then(finite);
        progress.base_eval_loss = state.base_eval_loss.and_then(finite);
        progress.general_loss = state.general.and_then(|general| finite(general.head));
        progress.base_general_loss = state.general.and_then(|general| finite(general.base));
    }

    /// Goes (back) to optimizer steps, `step` of which are done.
    pub fn training(&mut self, step: u64, total: u64) {
        let (step, total) = self.of_all(step, total);
        if self.phase != Phase::Training {
            self.phase(Phase::Training, total, "steps");
            let mut progress = self.locked();
            (progress.step, progress.total_steps) = (step, total);
            drop(progress);
            if let Some(bar) = &self.bar {
                bar.set_position(step);
            }
        }
    }

    /// One optimizer step is done.
    pub fn step(&mut self, line: &StepLine, total: u64, seconds: f64) {
        let pace = self.pace.map_or(seconds, |pace| 0.9 * pace + 0.1 * seconds);
        self.pace = Some(pace);
        let (step, total) = self.of_all(line.step, total);
        let eta = (pace * total.saturating_sub(step) as f64).ceil() as u64;
        {
            let mut progress = self.locked();
            (progress.step, progress.total_steps) = (step, total);
            progress.train_loss = finite(line.loss);
            progress.tokens_per_second = finite(line.tokens_per_second);
            progress.eta_seconds = Some(eta);
        }
        let figures =
            format!("loss {:.4} · lr {:.2e} · {:.0} tokens/s · {} left", line.loss, line.lr, line.tokens_per_second, duration(eta));
        match &self.bar {
            Some(bar) => {
                bar.set_length(total);
                bar.set_position(step);
                bar.set_message(figures);
            }
            None => tracing::info!("step {step}/{total} · epoch {:.2} · {figures}", line.epoch),
        }
    }

    /// An evaluation is done.
    pub fn evaluation(&mut self, line: &EvaluationLine) {
        {
            let mut progress = self.locked();
            progress.eval_loss = finite(line.eval_loss);
            progress.base_eval_loss = line.base_eval_loss.and_then(finite);
            progress.general_loss = line.general_loss.and_then(finite);
            progress.base_general_loss = line.base_general_loss.and_then(finite);
        }
        let base = line.base_eval_loss.map_or_else(String::new, |base| format!(" (base {base:.4})"));
        let accuracy = line.eval_accuracy.map_or_else(String::new, |accuracy| format!(", accuracy {accuracy:.3}"));
        let general = match (line.general_loss, line.base_general_loss) {
            (Some(head), Some(base)) => format!(" · general text {head:.4} (base {base:.4})"),
            _ => String::new(),
        };
        let (step, epoch, loss) = (line.step, line.epoch, line.eval_loss);
        self.note(&format!("evaluation after step {step} · epoch {epoch:.2} · loss {loss:.4}{base}{accuracy}{general}"));
    }

    /// One line that stays.
    pub fn note(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| tracing::info!("{text}")),
            None => tracing::info!("{text}"),
        }
    }

    /// One line that stays and should be read.
    pub fn warn(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| tracing::warn!("{text}")),
            None => tracing::warn!("{text}"),
        }
    }

    /// Takes the bar away.
    pub fn finish(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }

    /// A copy of what the endpoint shows.
    pub fn progress(&self) -> Progress {
        self.locked().clone()
    }

    fn locked(&self) -> MutexGuard<'_, Progress> {
        // Every update leaves a whole value, so a poisoned lock is harmless.
        self.snapshot.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// `1 h 02 min`, `3 min 20 s` or `14 s`.
pub fn duration(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} min {:02} s", seconds / 60, seconds % 60),
        _ => format!("{} h {:02} min", seconds / 3600, seconds % 3600 / 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_shows_in_the_snapshot() {
        let mut console = Console::default();
        console.step(&StepLine { step: 5, loss: f64::NAN, tokens_per_second: 100.0, ..StepLine::default() }, 10, 2.0);
        let progress = console.progress();
        assert_eq!((progress.step, progress.total_steps, progress.train_loss, progress.eta_seconds), (5, 10, None, Some(10)));
    }

    #[test]
    fn durations_read_well() {
        assert_eq!([duration(14), duration(200), duration(3725)], ["14 s", "3 min 20 s", "1 h 02 min"]);
    }
}
