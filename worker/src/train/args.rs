//! Places of a trainer; everything else is in the configuration file.

use std::net::SocketAddr;
use std::path::PathBuf;

use carryon_crds::pool::Device;

/// `carryon-worker train`.
#[derive(Clone, Debug, clap::Args)]
pub struct TrainArgs {
    /// Configuration ([`carryon_crds::wire::TrainConfig`] as JSON).
    #[arg(long)]
    pub config: PathBuf,
    /// Base URLs of the pool.
    #[arg(long, value_delimiter = ',', required = true)]
    pub pool: Vec<String>,
    /// Base URLs of a further pool whose hidden states the head reads; again for each, in the order of the configuration.
    #[arg(long)]
    pub other_pool: Vec<String>,
    /// Folder that holds the files of the splits.
    #[arg(long)]
    pub data: PathBuf,
    /// Folder for checkpoints, cache, head and report.
    #[arg(long)]
    pub output: PathBuf,
    /// Folder of hidden states that jobs share; the job has its own in the output folder when absent.
    #[arg(long)]
    pub state_cache: Option<PathBuf>,
    /// Folder of the head (head.safetensors) whose blocks and bridges training starts from; the configuration has its digest.
    #[arg(long)]
    pub init_head: Option<PathBuf>,
    /// Address of the progress endpoint.
    #[arg(long, default_value = "127.0.0.1:8081")]
    pub listen: SocketAddr,
    /// File the last words go to.
    #[arg(long)]
    pub termination_log: Option<PathBuf>,
    /// Print what memory training would take, and do none of it: the output folder is not touched.
    #[arg(long)]
    pub plan: bool,
    /// What to train on: cpu, cuda, or cuda:1 for the second device; auto is a CUDA device where there is one. The same device for all attempts gives
    /// all steps the same arithmetic.
    #[arg(long, default_value_t = Device::Cpu)]
    pub device: Device,
    /// Threads of the head's arithmetic; all cores when absent.
    #[arg(long)]
    pub threads: Option<usize>,
}
