//! What operator and worker, and workers of different versions, say to each other.

pub mod config;
pub mod fetch;
pub mod gateway;
pub mod head;
pub mod limits;
pub mod memory;
pub mod model;
pub mod progress;

pub use config::{BaseConfig, OtherPool, ServeConfig, ServeHead, TapChoice, TrainConfig};
pub use fetch::{FetchFailure, FetchReport, is_commit};
pub use gateway::{GatewayStatus, KeyState};
pub use head::{BaseReference, Figure, HeadManifest, HeadShape, OtherBase};
pub use model::{Identity, Limits, ModelDescription, Numerics};
pub use progress::{ExitCode, Progress, TerminationMessage};

use sha2::{Digest as _, Sha256};

/// `sha256:<hex>` of `bytes`: how models, tokenizers, templates and heads are named.
pub fn digest(bytes: &[u8]) -> String {
    digest_of(Sha256::new_with_prefix(bytes))
}

/// `sha256:<hex>` of what a hasher was fed.
pub fn digest_of(hasher: Sha256) -> String {
    format!("sha256:{}", hex(&hasher.finalize()))
}

/// Two digits a byte.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[allow(clippy::trivially_copy_pass_by_ref)] // serde passes a reference
fn is_yes(value: &bool) -> bool {
    *value
}
