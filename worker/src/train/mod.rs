//! `train`: trains one head on a pool's hidden states.
//!
//! Read [`fit`] for the loop and [`step`] for its arithmetic; [`run`](mod@run) puts a trainer together. The loop knows a source of hidden states
//! ([`states::HiddenStates`]) and a loss ([`loss::Loss`]), not HTTP. **Invariant** a run that was stopped or killed and went on has the bits of one
//! that was not: whatever a step depends on is in the checkpoint, or a pure function of configuration and data.

mod alpha;
mod answers;
mod args;
pub mod average;
pub mod batches;
pub mod cached;
mod checkpoint;
pub mod data;
mod device;
pub mod dropout;
pub mod endpoint;
pub mod error;
mod exact_match;
mod examples;
pub mod figures;
mod finish;
pub mod fit;
pub mod lock;
pub mod loss;
pub mod memory;
pub mod metrics;
pub mod optim;
pub mod output;
pub mod plan;
pub mod pool;
mod prepare;
pub mod progress;
pub mod report;
pub mod room;
pub mod run;
pub mod schedule;
mod seeds;
mod sets;
mod start;
mod states;
pub mod step;
pub mod stop;
mod tally;
pub mod tensorboard;

pub use args::TrainArgs;
pub use error::{DataError, TrainError};
pub use run::{run, run_until};
