//! Places of a pool pod; everything else is in the configuration file.

use std::net::SocketAddr;
use std::path::PathBuf;

use carryon_crds::names;
use carryon_crds::pool::Device;

/// `carryon-worker base`.
#[derive(Clone, Debug, clap::Args)]
pub struct BaseArgs {
    /// Configuration ([`carryon_crds::wire::BaseConfig`] as JSON).
    #[arg(long)]
    pub config: PathBuf,
    /// GGUF file, or folder with config.json, *.safetensors and tokenizer.json.
    #[arg(long)]
    pub model: PathBuf,
    /// Address to listen on.
    #[arg(long, default_value = "127.0.0.1:8080")]
    pub listen: SocketAddr,
    /// Seconds that answers may go on after the pod was told to end.
    #[arg(long, default_value_t = crate::http::DRAIN_SECONDS)]
    pub drain_seconds: u64,
    /// What to compute on: auto, cpu, cuda, or cuda:1 for the second device; as the configuration says when absent.
    #[arg(long)]
    pub device: Option<Device>,
    /// Bytes of memory that the process may use: its pod's limit, or what the node gives to pods.
    #[arg(long, env = names::MEMORY_LIMIT)]
    pub memory_limit: Option<u64>,
    /// Threads of the model's arithmetic; all cores when absent.
    #[arg(long)]
    pub threads: Option<usize>,
}
