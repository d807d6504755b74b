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
    /// Base URLs of a further pool whose hidden states the heads read; again for each, in the order in which they were trained on them.
    #[arg(long)]
    pub other_pool: Vec<String>,
    /// Folder that holds head.safetensors; once for each of the configuration's heads, in their order.
    #[arg(long)]
    pub head: Vec<PathBuf>,
    /// Address of the API.
    #[arg(long, default_value = "127.0.0.1:8000")]
    pub listen: SocketAddr,
    /// File with a key that clients must send as a bearer token; it may change at any time. Given more than once, each of the keys fits;
    /// none is asked for when absent.
    #[arg(long)]
    pub api_key_file: Vec<PathBuf>,
    /// Seconds that a request waits for a pool that restarts or is away.
    #[arg(long, default_value_t = 60)]
    pub patience_seconds: u64,
    /// Seconds that answers may go on after the gateway was told to end.
    #[arg(long, default_value_t = crate::http::DRAIN_SECONDS)]
    pub drain_seconds: u64,
    /// Threads; all cores when absent.
    #[arg(long)]
    pub threads: Option<usize>,
}
