//! `train`: trains one head on a pool's hidden states.

mod args;
pub mod batches;
pub mod checkpoint;
pub mod data;
pub mod endpoint;
pub mod error;
pub mod fit;
pub mod loss;
pub mod memory;
pub mod metrics;
pub mod optim;
pub mod output;
pub mod plan;
pub mod pool;
pub mod progress;
pub mod schedule;
pub mod states;
pub mod step;
pub mod stop;

pub use args::TrainArgs;
pub use error::{DataError, TrainError};
