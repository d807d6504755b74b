//! Steps of optimizers.

mod adamw;
mod chunks;
mod muon;

pub use adamw::adamw;
pub use muon::muon;

use crate::kernel::moment::WEIGHT;
