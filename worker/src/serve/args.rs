//! Places of a gateway; everything else is in the configuration file.

use std::net::SocketAddr;
use std::path::PathBuf;

/// `carryon-worker serve`.
#[derive(Clone, Debug, clap::Args)]
pub struct ServeArgs {
    /// Configuration ([`carryon_crds::wire::ServeConfig`] as JSON).
    #[arg(long)]
    pub config: PathBuf,
    /// Base URLs of the pool.
    #[arg(long, value_delimiter = ',', required = true)]
    pub pool: Vec<String>,
    /// Folder that holds head.safetensors.
    #[arg(long)]
    pub head: PathBuf,
    /// Address of the API.
    #[arg(long, default_value = "127.0.0.1:8000")]
    pub listen: SocketAddr,
    /// File with the key that clients must send as a bearer token; it may change at any time. None is asked for when absent.
    #[arg(long)]
    pub api_key_file: Option<PathBuf>,
    /// Seconds that a request waits for a pool that restarts or is away.
    #[arg(long, default_value_t = 60)]
    pub patience_seconds: u64,
    /// Threads; all cores when absent.
    #[arg(long)]
    pub threads: Option<usize>,
}
