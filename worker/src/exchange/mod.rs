//! The protocol between pools and their clients: wire types, client, cache.
//!
//! Plain HTTP/1.1; a body is JSON or a safetensors file, a stream is a concatenation of safetensors files.

pub mod cache;
pub mod client;
pub mod frames;
pub mod loss;
pub mod states;
pub mod wire;

pub use cache::{CacheError, CacheKey, StateCache};
pub use client::{ClientError, Endpoint, PoolClient};
pub use loss::{LossRequest, LossResponse};
pub use states::SequenceStates;
