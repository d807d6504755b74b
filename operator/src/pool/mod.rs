//! `BaseModelPool`: a StatefulSet of pods that each hold the whole model.

pub mod build;
pub mod capacity;
pub mod download;
pub mod gpu;
pub mod observe;
pub mod source;
pub mod status;
pub mod validate;

pub use build::{Applied, Children, build};
pub use observe::Observed;
pub use status::status;
pub use validate::{Validated, validate};
