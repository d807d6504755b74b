//! `train`: trains one head on a pool's hidden states.

mod args;
pub mod batches;
pub mod data;
pub mod error;
pub mod optim;
pub mod schedule;

pub use args::TrainArgs;
pub use error::{DataError, TrainError};
