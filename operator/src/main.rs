//! `carryon-operator`.

use std::io::{IsTerminal as _, Write as _};
use std::process::ExitCode;

use carryon_operator::cluster::{self, RunArgs};
use carryon_operator::local::args::LocalCommand;
use carryon_operator::{crd, local};
use clap::{Parser, Subcommand};
use tracing_subscriber::EnvFilter;

/// Runs Carry-On's three kinds: frozen base models, training jobs, served heads.
#[derive(Parser)]
#[command(name = "carryon-operator", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Print the CustomResourceDefinitions as YAML.
    Crds {
        /// Ask the cluster instead whether they take every object that is stored, field by field; fails when they do not.
        #[arg(long)]
        check: bool,
    },
    /// Look after the three kinds in a cluster.
    Run(Box<RunArgs>),
    /// Ask a URL until the answer is 2xx; fails when it is not for half a minute.
    Probe {
        /// The URL, e.g. http://carry-on.carry-on-system.svc:8080/readyz.
        url: String,
    },
    /// Run manifests on this machine, without a cluster.
    #[command(subcommand)]
    Local(LocalCommand),
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {}", error.chain().map(ToString::to_string).collect::<Vec<_>>().join(": "));
            ExitCode::FAILURE
        }
    }
}

fn run() -> anyhow::Result<()> {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("warn"));
    tracing_subscriber::fmt().with_env_filter(filter).with_ansi(std::io::stderr().is_terminal()).with_writer(std::io::stderr).init();
    match Cli::parse().command {
        Command::Crds { check: true } => cluster::stored::check()?,
        Command::Crds { check: false } => std::io::stdout().write_all(crd::yaml()?.as_bytes())?,
        Command::Run(args) => cluster::run(*args)?,
        Command::Probe { url } => cluster::probe(&url)?,
        Command::Local(command) => local::run(command)?,
    }
    Ok(())
}
