//! `CarryOnDeployment`: a gateway that serves one head.

pub mod build;
pub mod observe;
pub mod status;
pub mod validate;

pub use build::{Applied, Children, build};
pub use observe::{Observed, referenced_claim, refers_to};
pub use status::status;
pub use validate::{Validated, validate};
