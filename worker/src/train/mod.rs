//! `train`: trains one head on a pool's hidden states.

mod args;
pub mod batches;
pub mod checkpoint;
pub mod data;
pub mod endpoint;
pub mod error;
pub mod memory;
pub mod metrics;
pub mod optim;
pub mod progress;
pub mod schedule;
pub mod stop;

pub use args::TrainArgs;
pub use error::{DataError, TrainError};
