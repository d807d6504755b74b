//! `CarryOnDeployment`: a gateway that serves heads.

pub mod build;
pub mod heads;
mod keys;
pub mod observe;
pub mod status;
pub mod validate;

pub use build::{Applied, Children, build, pools};
pub use heads::{referenced_claims, referenced_jobs, refers_to};
pub use keys::asked;
pub use observe::Observed;
pub use status::status;
pub use validate::{Validated, validate};
