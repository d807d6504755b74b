//! `carryon-operator`.

use std::io::Write as _;

use clap::{Parser, Subcommand};

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
    Crds,
}

fn main() -> anyhow::Result<()> {
    match Cli::parse().command {
        Command::Crds => std::io::stdout().write_all(carryon_operator::crd::yaml()?.as_bytes())?,
    }
    Ok(())
}
