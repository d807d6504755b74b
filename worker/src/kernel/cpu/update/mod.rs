//! Steps of optimizers, and averages of what they leave.

mod adamw;
mod average;
mod chunks;
mod muon;

pub use adamw::adamw;
pub use average::average;
pub use muon::muon;

use crate::kernel::moment::WEIGHT;
