//! The protocol between pools and their clients: wire types, client, cache.
//!
//! Plain HTTP/1.1; a body is JSON or a safetensors file, a stream is a concatenation of safetensors files.
//! Measured on two cores with `bench_exchange`, states already computed, two requests in flight as a trainer has them:
//! 2.6 to 3.2 GB/s decoded in the client, 0.64 to 0.83 of a raw copy over loopback (one request at a time: about 0.4).
//!
//! **States travel as they are**, not projected to the head's width by the pool, and x̂ goes back with the head's output. Projected, those of the README's
//! recipe would be a tenth as large; but a cache of them would be one head's, no longer the pool's and the data's, which ten jobs share, and a bridge could
//! learn only by another way back. What travels is no bottleneck either: a pool computes 9 MB of states a second where the exchange carries more than a
//! hundred times as many, and a trainer waits for 5 % of its steps. x̂ is a fifth of a loss's bytes; a pool that kept it would have to for all of the data,
//! since from the second epoch on states come from the cache.

pub mod cache;
pub mod client;
pub mod frames;
pub mod loss;
pub mod mixing;
pub mod requests;
mod sampling;
pub mod states;
pub mod wire;

pub use cache::{CacheError, CacheKey, StateCache};
pub use client::{ClientError, Endpoint, Payload, PoolClient, Silence};
pub use loss::{LossRequest, LossResponse};
pub use states::SequenceStates;
