//! The Carry-On API: three custom resources, their conditions, names and labels, and the wire types
//! that operator and worker share. Pure data: no client, no clock, no file system.

#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod common;
pub mod condition;
pub mod deployment;
pub mod job;
pub mod names;
pub mod pool;
pub mod quantity;
pub mod wire;

pub use deployment::{CarryOnDeployment, CarryOnDeploymentSpec, CarryOnDeploymentStatus};
pub use job::{CarryOnJob, CarryOnJobSpec, CarryOnJobStatus};
pub use pool::{BaseModelPool, BaseModelPoolSpec, BaseModelPoolStatus};

/// API group of the three kinds.
pub const GROUP: &str = "carryon.dev";
/// The served API version.
pub const VERSION: &str = "v1alpha1";
