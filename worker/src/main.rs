//! `carryon-worker`: one binary for the pods of pools, trainers and gateways.

use std::io::IsTerminal as _;

use carryon_crds::wire::ExitCode;
use carryon_worker::base::{self, BaseArgs};
use carryon_worker::fetch::{self, FetchArgs};
use carryon_worker::serve::{self, ServeArgs};
use carryon_worker::text;
use carryon_worker::train::{self, TrainArgs};
use clap::Parser;
use tracing_subscriber::EnvFilter;

/// Runs a pool, a trainer or a gateway; fetches models.
#[derive(Parser)]
#[command(name = "carryon-worker", version)]
enum Command {
    /// Run a frozen base model: hidden states, losses, answers.
    Base(BaseArgs),
    /// Train a head on a pool's hidden states.
    Train(TrainArgs),
    /// Serve heads as an OpenAI-compatible endpoint.
    Serve(ServeArgs),
    /// Fetch a model into a folder, from a hub, a bucket or a web server; goes on where it was when it was ended.
    Fetch(FetchArgs),
    /// Render chat templates, a line of JSON each: what the others run it for, under limits of the kernel.
    #[command(hide = true)]
    Render,
}

/// An error and the exit code the operator reads it by.
type Failure = (ExitCode, anyhow::Error);

fn main() -> std::process::ExitCode {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(std::io::stderr().is_terminal()).init();
    let command = match Command::try_parse() {
        Ok(command) => command,
        Err(error) => {
            // Help and version are asked for; all else is a command line nobody can run. Printing fails when the terminal is gone.
            let code = if error.use_stderr() { ExitCode::Configuration } else { ExitCode::Complete };
            let _ = error.print();
            return (code as u8).into();
        }
    };
    if let Ok(program) = std::env::current_exe() {
        text::render_apart(program);
    }
    let code = run(command).unwrap_or_else(|(code, error)| {
        tracing::error!("{error}");
        code
    });
    (code as u8).into()
}

fn run(command: Command) -> Result<ExitCode, Failure> {
    match command {
        Command::Base(args) => base::run(&args).map_err(|error| (error.exit_code(), error.into())),
        Command::Train(args) => train::run(&args).map_err(|error| (error.exit_code(), error.into())),
        Command::Serve(args) => serve::run(&args).map_err(|error| (error.exit_code(), error.into())),
        Command::Fetch(args) => fetch::run(&args).map_err(|error| (error.exit_code(), error.into())),
        Command::Render => text::render_lines().map(|()| ExitCode::Complete).map_err(|error| (ExitCode::Configuration, error.into())),
    }
}
