//! Our own kernels: packed matrices and the products over them, in bf16 and f32; row operations and attention.
//!
//! Both number types share one layout and one kernel: a *word* is 32 bits and holds two neighbouring bf16 values or one f32.

mod attention;
mod backend;
mod backward;
mod blocks;
mod buffers;
pub(crate) mod isa;
mod loss;
mod operand;
mod outline;
mod pages;
mod panels;
mod product;
mod rows;
mod sink;
mod sparse;
mod threads;
mod tile;
mod update;
mod widen;

pub use attention::{Queries, attend};
pub use backend::Cpu;
pub use backward::pool;
pub use buffers::{PackedRows, Places, Rows};
pub use isa::name;
pub(crate) use isa::vectorised;
pub use operand::{pack_row, round_bf16, unpack_row, words};
pub use outline::{Weight, block_weights, inverse, outline};
pub use pages::Pages;
pub(super) use pages::page_words;
pub use panels::Panels;
pub use product::{Left, Part, matmul, product, product_heads};
pub use rows::{add, dot, exp, reduce, rms_norm, rope, silu_mul, softmax_row};
pub use sink::Sink;
pub use threads::Threads;
