//! `CarryOnJob`: one batch Job per training attempt; the operator decides every next one.

pub mod attempts;
pub mod build;
pub mod end;
mod general;
mod memory;
pub mod observe;
pub mod plan;
pub mod record;
pub mod status;
pub mod trainers;
pub mod validate;

pub use attempts::life_left;
pub use build::{Applied, Children, build};
pub use end::has_ended;
pub use observe::{Observed, lacks_pod};
pub use plan::until_next;
pub use status::status;
pub use validate::{Validated, validate};
