//! The server beneath pool, trainer and gateway: what a slow or greedy client may cost. Knows no other room.
//!
//! Who says nothing is disconnected, a body must come within its time, and all bodies of a process fit into one budget of
//! bytes. An answer may take as long as it likes: neither streams nor long requests of trainers are cut off.

mod body;
mod linger;
mod server;
mod streamed;

/// Seconds that answers may go on after a process was told to end: what a pod's 60 seconds of grace leave beside the time in which its address
/// goes from the Services.
pub const DRAIN_SECONDS: u64 = 50;

pub use body::{Bodies, BodyError};
pub use server::{Silence, serve};
pub use streamed::Streamed;
