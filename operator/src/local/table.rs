//! What the user sees while local mode runs: a live table on a terminal, lines on change elsewhere.

use std::collections::BTreeMap;
use std::io::{self, IsTerminal as _, Write as _};
use std::time::{Duration, Instant};

use comfy_table::{ContentArrangement, Table, presets};
use k8s_openapi::jiff;
use serde_json::Value;

use super::store::{Key, Store};

/// Least time between two progress lines of one object where there is no terminal.
const PROGRESS_PERIOD: Duration = Duration::from_secs(5);

/// Characters of a bar.
const BAR: usize = 20;

/// What is said of one object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    /// The object.
    pub key: Key,
    /// `Ready`, `Complete`, `Failed`, `Suspended`, `Not ready` or `Damaged`.
    pub state: String,
    /// Message of its Ready condition.
    pub message: String,
    /// Progress of a job or of a fetch, address of a gateway, size of a model.
    pub detail: String,
}

/// The rows of all objects of the three kinds, and of those of any kind that cannot be read.
pub fn rows(store: &Store) -> Vec<Row> {
    let kinds = ["BaseModelPool", "CarryOnJob", "CarryOnDeployment"];
    let damaged = store.damaged().iter().map(|(key, problem)| Row {
        key: key.clone(),
        state: "Damaged".to_owned(),
        message: problem.clone(),
        detail: if kinds.contains(&key.kind.as_str()) { "apply it again".to_owned() } else { String::new() },
    });
    kinds.into_iter().flat_map(|kind| store.values(kind)).map(row).chain(damaged).collect()
}

fn row(value: &Value) -> Row {
    let status = &value["status"];
    let condition = |type_: &str| status["conditions"].as_array().into_iter().flatten().find(|condition| condition["type"] == type_);
    let holds = |type_: &str| condition(type_).is_some_and(|condition| condition["status"] == "True");
    let state = ["Complete", "Failed", "Suspended", "Stalled", "Ready"].into_iter().find(|type_| holds(type_)).unwrap_or("Not ready");
    let message = condition("Ready").and_then(|condition| condition["message"].as_str()).unwrap_or("not seen yet");
    let detail = match value["kind"].as_str() {
        Some("BaseModelPool") if status["model"].is_object() => model(&status["model"]),
        Some("BaseModelPool") => download(&status["download"]),
        Some("CarryOnJob") => progress(&status["progress"]),
        _ => status["url"].as_str().unwrap_or_default().to_owned(),
    };
    Row { key: Key::of_value(value), state: state.to_owned(), message: message.to_owned(), detail }
}

fn model(model: &Value) -> String {
    match model["layers"].as_u64() {
        Some(layers) => format!("{layers} layers, width {}, vocabulary {}", model["hiddenSize"], model["vocabSize"]),
        None => String::new(),
    }
}

/// A bar, and how far it is: `━━━━━━━───────────── 35 %, 21.4 GB of 61.1 GB, 7 min left`.
fn download(download: &Value) -> String {
    let total = download["totalBytes"].as_u64().filter(|total| *total > 0);
    let (Some(bytes), Some(total)) = (download["bytes"].as_u64(), total) else { return String::new() };
    let filled = (u128::from(bytes) * BAR as u128 / u128::from(total)) as usize;
    let bar: String = (0..BAR).map(|place| if place < filled { '━' } else { '─' }).collect();
    format!("{bar} {}", download["progress"].as_str().unwrap_or_default())
}

/// `step 10/76, loss 0.71, eval 0.64 (base 1.31), 900 tokens/s, 41 s left`.
fn progress(progress: &Value) -> String {
    let mut parts = Vec::new();
    if let (Some(step), Some(total)) = (progress["step"].as_u64(), progress["totalSteps"].as_u64()) {
        parts.push(if total > 0 { format!("step {step}/{total}") } else { format!("step {step}") });
    }
    let figure = |name: &str| progress[name].as_str();
    parts.extend(figure("trainLoss").map(|loss| format!("loss {loss}")));
    parts.extend(figure("evalLoss").map(|loss| match figure("baseEvalLoss") {
        Some(base) => format!("eval {loss} (base {base})"),
        None => format!("eval {loss}"),
    }));
    parts.extend(figure("tokensPerSecond").map(|rate| format!("{rate} tokens/s")));
    parts.extend(progress["etaSeconds"].as_u64().filter(|seconds| *seconds > 0).map(|seconds| format!("{seconds} s left")));
    parts.join(", ")
}

/// Rows as a table.
pub fn render(rows: &[Row]) -> String {
    let mut table = Table::new();
    table.load_style(presets::UTF8_BORDERS_ONLY).set_content_arrangement(ContentArrangement::Dynamic);
    if !io::stdout().is_terminal() {
        table.set_width(160);
    }
    table.set_header(["object", "state", "what it does", "progress"]);
    for row in rows {
        table.add_row([row.key.to_string(), row.state.clone(), row.message.clone(), row.detail.clone()]);
    }
    table.to_string()
}

/// Shows rows as they change.
pub struct Display {
    terminal: bool,
    shown: Vec<Row>,
    lines: usize,
    said: BTreeMap<Key, (Row, Instant)>,
}

impl Display {
    /// On stdout.
    pub fn new() -> Self {
        Self { terminal: io::stdout().is_terminal(), shown: Vec::new(), lines: 0, said: BTreeMap::new() }
    }

    /// Shows `rows`, if they have changed.
    pub fn show(&mut self, rows: Vec<Row>) -> io::Result<()> {
        if rows == self.shown {
            return Ok(());
        }
        if self.terminal {
            self.draw(&rows)?
        } else {
            rows.iter().try_for_each(|row| self.say(row))?
        }
        self.shown = rows;
        Ok(())
    }

    fn draw(&mut self, rows: &[Row]) -> io::Result<()> {
        let text = render(rows);
        let mut out = io::stdout().lock();
        if self.lines > 0 {
            // Back to the table's first line, and clear from there.
            write!(out, "\x1b[{}A\x1b[J", self.lines)?;
        }
        self.lines = text.lines().count();
        writeln!(out, "{text}")?;
        out.flush()
    }

    fn say(&mut self, row: &Row) -> io::Result<()> {
        if let Some((before, at)) = self.said.get(&row.key) {
            let same = (&before.state, &before.message) == (&row.state, &row.message);
            if same && (before.detail == row.detail || at.elapsed() < PROGRESS_PERIOD) {
                return Ok(());
            }
        }
        self.said.insert(row.key.clone(), (row.clone(), Instant::now()));
        let time = jiff::Zoned::now().strftime("%H:%M:%S").to_string();
        let detail = if row.detail.is_empty() { String::new() } else { format!(" [{}]", row.detail) };
        writeln!(io::stdout().lock(), "{time} {} {}: {}{detail}", row.key, row.state, row.message)
    }
}

impl Default for Display {
    fn default() -> Self {
        Self::new()
    }
}
