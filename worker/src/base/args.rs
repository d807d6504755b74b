//! Places of a pool pod; everything else is in the configuration file.

use std::net::SocketAddr;
use std::path::PathBuf;

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
    /// Threads of the model's arithmetic; all cores when absent.
    #[arg(long)]
    pub threads: Option<usize>,
}
