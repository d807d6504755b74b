//! What can go wrong in a pool pod before it serves, and the exit code each failure maps to.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;

use carryon_crds::pool::Device;
use carryon_crds::quantity::Bytes;
use carryon_crds::wire::ExitCode;

use crate::kernel::DeviceError;
use crate::model::ModelError;
use crate::text::TextError;

/// Why a pool pod ended.
#[derive(Debug, thiserror::Error)]
pub enum BaseError {
    /// The configuration file cannot be read.
    #[error("failed to read configuration {path:?}: {reason}")]
    Configuration {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The worker cannot compute where it should.
    #[error("engine.device is {device}, and this worker is built without CUDA: start the image for CUDA, or say auto or cpu")]
    WithoutCuda {
        /// Where.
        device: Device,
    },
    /// Keys and values would take all memory.
    #[error("engine.kvCacheMemory: {wanted} and the weights do not fit into the pod's memory: {limit}")]
    KvCacheTooLarge {
        /// What they should have.
        wanted: Bytes,
        /// What there is.
        limit: Bytes,
    },
    /// The checkpoint cannot be used.
    #[error("failed to load the model: {0}")]
    Model(#[from] ModelError),
    /// The checkpoint's tokenizer cannot be used.
    #[error("failed to load the tokenizer of {path:?}: {source}")]
    Tokenizer {
        /// GGUF file or tokenizer.json.
        path: PathBuf,
        /// Why.
        source: TextError,
    },
    /// The checkpoint's chat template cannot be used.
    #[error("failed to load the chat template of {path:?}: {source}")]
    Template {
        /// GGUF file or folder.
        path: PathBuf,
        /// Why.
        source: TextError,
    },
    /// A file beside the weights cannot be read.
    #[error("failed to read {path:?}: {reason}")]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// A file beside the weights is not what it should be.
    #[error("{path:?}: {reason}")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// Nobody can listen on the address.
    #[error("failed to listen on {address}: {source}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// The server or its signals failed.
    #[error("failed to serve: {0}")]
    Serve(io::Error),
    /// The thread that owns the model ended.
    #[error("the device thread panicked")]
    Device,
    /// The device did not do what it was told.
    #[error(transparent)]
    DeviceFailed(#[from] DeviceError),
}

impl BaseError {
    /// The exit code of this failure.
    pub fn exit_code(&self) -> ExitCode {
        match self {
            Self::Configuration { .. } | Self::WithoutCuda { .. } | Self::KvCacheTooLarge { .. } => ExitCode::Configuration,
            Self::Model(ModelError::Unsupported { .. }) | Self::Tokenizer { .. } | Self::Template { .. } => ExitCode::Configuration,
            Self::Model(ModelError::Invalid { .. }) | Self::Damaged { .. } => ExitCode::Data,
            Self::Model(ModelError::Read { .. } | ModelError::Device(_))
            | Self::File { .. }
            | Self::Listen { .. }
            | Self::Serve(_)
            | Self::Device
            | Self::DeviceFailed(_) => ExitCode::Retryable,
        }
    }
}
