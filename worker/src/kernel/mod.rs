//! Packed matrices and the products over them, in bf16 and f32; row operations and attention.
//!
//! **Invariant**: every output element is one chain of multiply-adds over k in a fixed order. It does not depend on the other rows,
//! on chunking or on the number of threads, so a sequence alone and in a batch gives equal bits.
//!
//! Both precisions share one layout and one kernel: a *word* is 32 bits and holds two neighbouring bf16 values or one f32.

mod attention;
pub(crate) mod cpu;
mod operand;
mod panels;
mod product;
mod rows;
mod threads;
mod tile;

pub use attention::{Attention, KeyValues, Span, attend};
pub use cpu::name;
pub(crate) use cpu::vectorised;
pub use operand::{pack_row, round_bf16, unpack_row, words};
pub use panels::Panels;
pub use product::{Left, Sink, matmul, product};
pub use rows::{Rotation, add, dot, exp, rms_norm, rope, silu_mul, softmax_row};
pub use threads::Threads;

/// Number type of a packed matrix and of what is multiplied with it; sums are f32 in both.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// f32 throughout.
    F32,
    /// Both factors rounded to bf16, nearest even.
    Bf16,
}

impl Precision {
    /// The precision in which a pool of `dtype` multiplies.
    pub fn for_dtype(dtype: carryon_crds::pool::Dtype) -> Self {
        match dtype {
            carryon_crds::pool::Dtype::Bfloat16 => Self::Bf16,
            carryon_crds::pool::Dtype::Float32 => Self::F32,
        }
    }
}
