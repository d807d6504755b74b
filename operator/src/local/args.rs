//! Arguments of `carryon-operator local`.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};

/// `carryon-operator local …`.
#[derive(Debug, Subcommand)]
pub enum LocalCommand {
    /// Run manifests on this machine.
    Up(UpArgs),
    /// Stop what `up --detach` left running.
    Down(DownArgs),
    /// Show the objects and where they stand.
    Status(StateArgs),
    /// Print the logs of an object's pods.
    Logs(LogsArgs),
    /// What `up --detach` leaves behind.
    #[command(hide = true)]
    Supervise(SuperviseArgs),
}

/// Where local mode keeps everything.
#[derive(Clone, Debug, Args)]
pub struct StateArgs {
    /// Folder of objects, volumes and logs.
    #[arg(long, default_value = ".carryon")]
    pub state_dir: PathBuf,
}

/// `local up`.
#[derive(Debug, Args)]
pub struct UpArgs {
    /// Where everything is kept.
    #[command(flatten)]
    pub state: StateArgs,
    /// Manifests: YAML or JSON files, or folders of them.
    #[arg(short = 'f', long = "file", required = true, num_args = 1..)]
    pub files: Vec<PathBuf>,
    /// Use DIR as the volume of claim CLAIM in namespace default; kept for later runs.
    #[arg(long = "volume", value_name = "CLAIM=DIR", value_parser = volume)]
    pub volumes: Vec<(String, PathBuf)>,
    /// Worker binary; `carryon-worker` beside this program when absent.
    #[arg(long)]
    pub worker: Option<PathBuf>,
    /// Wait until this is reached; without --detach everything is stopped then.
    #[arg(long, value_enum)]
    pub until: Option<Until>,
    /// Give up waiting after this long, e.g. `300`, `90s`, `10m`.
    #[arg(long, value_parser = duration, requires = "until")]
    pub timeout: Option<Duration>,
    /// Leave everything running in the background; `local down` ends it.
    #[arg(long)]
    pub detach: bool,
}

/// What `--until` waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Until {
    /// Every job is Complete, every pool and deployment Ready.
    Complete,
}

/// `local supervise`.
#[derive(Debug, Args)]
pub struct SuperviseArgs {
    /// Where everything is kept.
    #[command(flatten)]
    pub state: StateArgs,
    /// Worker binary.
    #[arg(long)]
    pub worker: PathBuf,
}

/// `local down`.
#[derive(Debug, Args)]
pub struct DownArgs {
    /// Where everything is kept.
    #[command(flatten)]
    pub state: StateArgs,
    /// Forget the objects too; volumes stay.
    #[arg(long)]
    pub delete: bool,
}

/// `local logs`.
#[derive(Debug, Args)]
pub struct LogsArgs {
    /// Where everything is kept.
    #[command(flatten)]
    pub state: StateArgs,
    /// A pool, job or deployment, or one of their pods.
    pub name: String,
    /// Go on as the logs grow.
    #[arg(short, long)]
    pub follow: bool,
}

fn volume(text: &str) -> Result<(String, PathBuf), String> {
    match text.split_once('=') {
        Some((claim, folder)) if !claim.is_empty() && !folder.is_empty() && !claim.contains('/') => {
            Ok((claim.to_owned(), PathBuf::from(folder)))
        }
        _ => Err("expected CLAIM=DIR".to_owned()),
    }
}

fn duration(text: &str) -> Result<Duration, String> {
    let (number, unit) = match text.char_indices().find(|(_, c)| !c.is_ascii_digit()) {
        Some((at, _)) => text.split_at(at),
        None => (text, "s"),
    };
    let factor = match unit {
        "s" => 1,
        "m" => 60,
        "h" => 3600,
        _ => return Err("expected seconds, or a number with s, m or h".to_owned()),
    };
    let number: u64 = number.parse().map_err(|_| "expected a number".to_owned())?;
    number.checked_mul(factor).map(Duration::from_secs).ok_or_else(|| "too long".to_owned())
}
