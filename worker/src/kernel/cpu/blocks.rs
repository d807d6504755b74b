//! Weights in blocks of 32 inputs of an output, 8 or 4 bits each, which are widened to the words of a panel on the way to a product.
//!
//! A *group* is the block of each of a panel's 32 outputs: their factors (f16), their least values where they have some, and 16 steps of 32
//! codes of two inputs each. A transpose has the same groups with inputs and outputs in each other's place: its factors belong to inputs.

use std::ops::Range;

use super::operand::bf16_finite;
use super::panels::in_large_pages;
use super::threads::Threads;
use super::tile::COLUMNS;
use super::widen::{self, widened};
use crate::kernel::Bits;
use crate::kernel::block::{BLOCK, Block};

const _: () = assert!(BLOCK == COLUMNS, "a transpose has blocks as wide as panels");

/// The panels of a weight.
#[derive(PartialEq)]
pub(super) struct Blocks {
    /// Panel by panel, group by group.
    groups: Vec<u16>,
    bits: Bits,
    /// Groups of a panel.
    per_panel: usize,
    /// Whether factors belong to inputs.
    turned: bool,
}

impl Blocks {
    /// Steps of a group.
    pub const STEPS: usize = BLOCK / 2;

    /// Packs `n` rows of `k` values; absent ones are zero.
    pub fn from_rows(n: usize, k: usize, bits: Bits, threads: &Threads, fill: impl Fn(usize, &mut [f32]) + Sync) -> Self {
        let mut blocks = Self::zeros(n, k, bits, false);
        let length = blocks.per_panel * group_length(bits);
        threads.for_rows(&mut blocks.groups, length, 1, |panel, groups| {
            let mut row = vec![0.0; k.next_multiple_of(BLOCK)];
            for column in 0..COLUMNS.min(n - panel * COLUMNS) {
                fill(panel * COLUMNS + column, &mut row[..k]);
                for (group, values) in groups.chunks_exact_mut(group_length(bits)).zip(row.as_chunks::<BLOCK>().0) {
                    put(bits, group, column, &Block::of(bits, values));
                }
            }
        });
        blocks
    }

    /// The transpose of these blocks, which are those of `n` rows of `k` values.
    pub fn transposed(&self, n: usize, k: usize, threads: &Threads) -> Self {
        assert!(!self.turned, "a transpose is not transposed again");
        let mut turned = Self::zeros(k, n, self.bits, true);
        let length = turned.per_panel * group_length(self.bits);
        // Panel p of the transpose is made of group p of every panel: what was an output is an input.
        threads.for_rows(&mut turned.groups, length, 1, |panel, groups| {
            for (index, target) in groups.chunks_exact_mut(group_length(self.bits)).enumerate() {
                turn(self.bits, self.group(index, panel), target);
            }
        });
        turned
    }

    fn zeros(n: usize, k: usize, bits: Bits, turned: bool) -> Self {
        let per_panel = k.div_ceil(BLOCK);
        let groups = in_large_pages(vec![0; n.div_ceil(COLUMNS) * per_panel * group_length(bits)]);
        Self { groups, bits, per_panel, turned }
    }

    pub fn bytes(&self) -> usize {
        2 * self.groups.len()
    }

    /// The values of output `row`.
    pub fn row(&self, row: usize, values: &mut [f32]) {
        assert!(!self.turned, "a transpose is not read by rows");
        for (index, values) in values.chunks_mut(BLOCK).enumerate() {
            let group = self.group(row / COLUMNS, index);
            let (factor, least) = scale(self.bits, group, row % COLUMNS);
            for (at, value) in values.iter_mut().enumerate() {
                let exact = factor * decoded(self.bits, code(self.bits, group, at, row % COLUMNS)) + least;
                *value = f32::from_bits(bf16_finite(exact) << 16);
            }
        }
    }

    /// Some steps of a panel as words of bf16 pairs; the first is a multiple of [`Self::STEPS`].
    pub fn widen<'a>(&self, panel: usize, steps: Range<usize>, words: &'a mut Vec<u32>) -> &'a [u32] {
        words.resize(steps.len().next_multiple_of(Self::STEPS) * COLUMNS, 0);
        for (index, words) in words.chunks_exact_mut(Self::STEPS * COLUMNS).enumerate() {
            let group = self.group(panel, steps.start / Self::STEPS + index);
            let (scales, codes) = group.split_at(scales_length(self.bits));
            widen::widen(self.bits, self.turned, scales, codes, words);
        }
        &words[..steps.len() * COLUMNS]
    }

    fn group(&self, panel: usize, index: usize) -> &[u16] {
        let length = group_length(self.bits);
        &self.groups[(panel * self.per_panel + index) * length..][..length]
    }
}

/// Halves of a group that are factors, and least values.
fn scales_length(bits: Bits) -> usize {
    match bits {
        Bits::Q8 => BLOCK,
        Bits::Q4 => 2 * BLOCK,
    }
}

fn group_length(bits: Bits) -> usize {
    scales_length(bits)
        + match bits {
            Bits::Q8 => Blocks::STEPS * COLUMNS,
            Bits::Q4 => Blocks::STEPS * COLUMNS / 2,
        }
}

/// Writes a block as that of output `column`.
fn put(bits: Bits, group: &mut [u16], column: usize, block: &Block) {
    group[column] = block.factor.to_bits();
    if bits == Bits::Q4 {
        group[BLOCK + column] = block.least.to_bits();
    }
    block.codes.iter().enumerate().for_each(|(at, code)| put_code(bits, group, at, column, *code));
}

/// The factor and the least value of number `at`.
fn scale(bits: Bits, group: &[u16], at: usize) -> (f32, f32) {
    let least = if bits == Bits::Q4 { widened(group[BLOCK + at]) } else { 0.0 };
    (widened(group[at]), least)
}

fn decoded(bits: Bits, code: u8) -> f32 {
    match bits {
        Bits::Q8 => f32::from(code as i8),
        Bits::Q4 => f32::from(code),
    }
}

/// Where the code of an input and a column is: a half, and the bits below it. A step of Q4 is 32 bytes, whose low nibbles are its first inputs.
fn place(bits: Bits, input: usize, column: usize) -> (usize, usize) {
    let at = input / 2 * COLUMNS + column;
    match bits {
        Bits::Q8 => (scales_length(bits) + at, 8 * (input % 2)),
        Bits::Q4 => (scales_length(bits) + at / 2, 8 * (at % 2) + 4 * (input % 2)),
    }
}

fn code(bits: Bits, group: &[u16], input: usize, column: usize) -> u8 {
    let (half, shift) = place(bits, input, column);
    let mask = if bits == Bits::Q8 { 0xff } else { 0xf };
    ((group[half] >> shift) & mask) as u8
}

fn put_code(bits: Bits, group: &mut [u16], input: usize, column: usize, code: u8) {
    let (half, shift) = place(bits, input, column);
    group[half] |= u16::from(code) << shift;
}

/// Codes with inputs and columns in each other's place, and the same scales.
fn turn(bits: Bits, group: &[u16], target: &mut [u16]) {
    target[..scales_length(bits)].copy_from_slice(&group[..scales_length(bits)]);
    for input in 0..BLOCK {
        for column in 0..COLUMNS {
            put_code(bits, target, column, input, code(bits, group, input, column));
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::quantized::GgmlType;
    use candle_core::quantized::k_quants::{BlockQ4_1, BlockQ8_0};

    use super::*;
    use crate::kernel::cpu::round_bf16;

    fn values(count: usize) -> Vec<f32> {
        (0..count).map(|i| ((i * 7919 % 1009) as f32 - 400.0) / 3000.0).collect()
    }

    #[test]
    fn rows_are_those_of_ggml_and_read_as_they_are_widened() {
        let (n, k, threads) = (70, 96, Threads::new(2));
        let weight = values(n * k);
        for bits in [Bits::Q8, Bits::Q4] {
            let blocks = Blocks::from_rows(n, k, bits, &threads, |row, values| values.copy_from_slice(&weight[row * k..][..k]));
            let mut words = Vec::new();
            for row in 0..n {
                let (mut own, mut ggml) = (vec![0.0; k], vec![0.0; k]);
                blocks.row(row, &mut own);
                let source = &weight[row * k..][..k];
                match bits {
                    Bits::Q8 => {
                        let mut packed = vec![BlockQ8_0::zeros(); k / BLOCK];
                        BlockQ8_0::from_float(source, &mut packed);
                        BlockQ8_0::to_float(&packed, &mut ggml);
                    }
                    Bits::Q4 => {
                        let mut packed = vec![BlockQ4_1::zeros(); k / BLOCK];
                        BlockQ4_1::from_float(source, &mut packed);
                        BlockQ4_1::to_float(&packed, &mut ggml);
                    }
                }
                // A code may be the neighbour where a value lies in the middle.
                let step = if bits == Bits::Q8 { 0.4 / 127.0 } else { 0.4 / 15.0 };
                assert!(own.iter().zip(source).all(|(own, value)| (own - value).abs() <= 0.51 * step + 2e-3 * value.abs()), "{bits:?}");
                round_bf16(&mut ggml);
                let same = own.iter().zip(&ggml).filter(|(own, ggml)| own == ggml).count();
                assert!(same * 10 >= 9 * k, "{bits:?}: {same} of {k} are ggml's");
                blocks.widen(row / COLUMNS, 0..k / 2, &mut words);
                for (pair, own) in words.chunks(COLUMNS).zip(own.chunks(2)) {
                    let word = pair[row % COLUMNS];
                    assert_eq!([f32::from_bits(word << 16), f32::from_bits(word & 0xffff_0000)], own, "{bits:?}");
                }
            }
        }
    }

    #[test]
    fn a_transpose_has_the_same_numbers() {
        let (n, k, threads) = (70, 49, Threads::new(2));
        let weight = values(n * k);
        for bits in [Bits::Q8, Bits::Q4] {
            let blocks = Blocks::from_rows(n, k, bits, &threads, |row, values| values.copy_from_slice(&weight[row * k..][..k]));
            let turned = blocks.transposed(n, k, &threads);
            let mut words = Vec::new();
            for row in 0..n {
                let mut own = vec![0.0; k];
                blocks.row(row, &mut own);
                for (column, own) in own.into_iter().enumerate() {
                    let word = turned.widen(column / COLUMNS, 0..n / 2, &mut words)[row / 2 * COLUMNS + column % COLUMNS];
                    assert_eq!(f32::from_bits(if row % 2 == 0 { word << 16 } else { word & 0xffff_0000 }), own, "{bits:?}");
                }
            }
        }
    }
}
