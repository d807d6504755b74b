//! `CarryOnJob`: one batch Job per training attempt; the operator decides every next one.

pub mod attempts;
pub mod build;
pub mod observe;
pub mod status;
pub mod validate;

pub use attempts::{has_ended, life_left};
pub use build::{Applied, Children, build};
pub use observe::Observed;
pub use status::status;
pub use validate::{Validated, validate};
