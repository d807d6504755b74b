//! Where a product goes, tile by tile: stored, added, rounded, or through a gate.

use carryon_crds::pool::Dtype;

use super::isa::vectorised;
use super::operand::{pack_into, words};
use super::rows::{gelu_tanh, silu};
use super::threads::Disjoint;
use super::tile::COLUMNS;
use crate::kernel::Activation;

/// Where a product goes.
pub enum Sink<'a> {
    /// Overwrites f32 rows of n values.
    Store(&'a mut [f32]),
    /// Adds to f32 rows of n values.
    Add(&'a mut [f32]),
    /// Overwrites packed rows of n values, rounded to the number type of the right side.
    Pack(&'a mut [u32]),
    /// The right side holds 16 gate and 16 up outputs in turn; writes packed rows of `activation(gate) · up`, n / 2 values each.
    Gated(&'a mut [u32], Activation),
}

/// The sink, shared between the blocks of one product.
pub(super) enum Target<'a> {
    Store(Disjoint<'a, f32>, usize),
    Add(Disjoint<'a, f32>, usize),
    Pack(Disjoint<'a, u32>, usize, Dtype),
    Gated(Disjoint<'a, u32>, usize, Dtype, Activation),
}

impl<'a> Target<'a> {
    /// For rows of `width` values of a product of `dtype`.
    pub fn new(sink: &'a mut Sink<'_>, width: usize, dtype: Dtype) -> Self {
        match sink {
            Sink::Store(out) => Self::Store(Disjoint::new(out), width),
            Sink::Add(out) => Self::Add(Disjoint::new(out), width),
            Sink::Pack(out) => Self::Pack(Disjoint::new(out), words(dtype, width), dtype),
            Sink::Gated(out, activation) => Self::Gated(Disjoint::new(out), words(dtype, width / 2), dtype, *activation),
        }
    }

    /// Takes `rows` rows that start at `row`, `column`; of their 32 columns the first `columns` count.
    pub fn write(&self, row: usize, column: usize, rows: usize, columns: usize, tile: &[f32]) {
        let tile = &tile[..rows * COLUMNS];
        match self {
            Self::Store(out, n) => store(out, row * n + column, *n, columns, tile),
            Self::Add(out, n) => accumulate(out, row * n + column, *n, columns, tile),
            Self::Pack(out, stride, dtype) => round(out, row * stride + words(*dtype, column), *stride, columns, *dtype, tile),
            Self::Gated(out, stride, dtype, activation) => {
                let start = row * stride + words(*dtype, column / 2);
                match activation {
                    Activation::Silu => gate_silu(out, start, *stride, *dtype, tile),
                    Activation::GeluTanh => gate_gelu(out, start, *stride, *dtype, tile),
                }
            }
        }
    }
}

vectorised! {
    fn store(out: &Disjoint<'_, f32>, start: usize, stride: usize, width: usize, tile: &[f32]) {
        for (row, sums) in tile.as_chunks::<COLUMNS>().0.iter().enumerate() {
            // SAFETY: each tile is computed once, and tiles do not overlap.
            put(unsafe { out.slice(start + row * stride, width) }, sums, |value, sum| *value = sum);
        }
    }
}

vectorised! {
    fn accumulate(out: &Disjoint<'_, f32>, start: usize, stride: usize, width: usize, tile: &[f32]) {
        for (row, sums) in tile.as_chunks::<COLUMNS>().0.iter().enumerate() {
            // SAFETY: as in `store`.
            put(unsafe { out.slice(start + row * stride, width) }, sums, |value, sum| *value += sum);
        }
    }
}

vectorised! {
    fn round(out: &Disjoint<'_, u32>, start: usize, stride: usize, width: usize, dtype: Dtype, tile: &[f32]) {
        for (row, sums) in tile.as_chunks::<COLUMNS>().0.iter().enumerate() {
            // SAFETY: as in `store`.
            pack_into(dtype, &sums[..width], unsafe { out.slice(start + row * stride, words(dtype, width)) });
        }
    }
}

vectorised! {
    fn gate_silu(out: &Disjoint<'_, u32>, start: usize, stride: usize, dtype: Dtype, tile: &[f32]) {
        gate(out, start, stride, dtype, tile, silu);
    }
}

vectorised! {
    fn gate_gelu(out: &Disjoint<'_, u32>, start: usize, stride: usize, dtype: Dtype, tile: &[f32]) {
        gate(out, start, stride, dtype, tile, gelu_tanh);
    }
}

#[inline(always)]
fn gate(out: &Disjoint<'_, u32>, start: usize, stride: usize, dtype: Dtype, tile: &[f32], activation: impl Fn(f32) -> f32) {
    for (row, sums) in tile.as_chunks::<COLUMNS>().0.iter().enumerate() {
        let mut gated = [0.0; COLUMNS / 2];
        for (index, gated) in gated.iter_mut().enumerate() {
            *gated = activation(sums[index]) * sums[index + COLUMNS / 2];
        }
        // SAFETY: as in `store`.
        pack_into(dtype, &gated, unsafe { out.slice(start + row * stride, words(dtype, COLUMNS / 2)) });
    }
}

/// Puts the sums of one row where they belong; a whole panel takes a loop of known length.
#[inline(always)]
fn put(target: &mut [f32], sums: &[f32; COLUMNS], store: impl Fn(&mut f32, f32)) {
    if let Ok(target) = <&mut [f32; COLUMNS]>::try_from(&mut *target) {
        target.iter_mut().zip(sums).for_each(|(value, sum)| store(value, *sum));
    } else {
        target.iter_mut().zip(sums).for_each(|(value, sum)| store(value, *sum));
    }
}
