//! Rows as words: rounding to bf16 and packing in pairs.

use super::isa::vectorised;
use carryon_crds::pool::Dtype;

/// Words of a row of `values` values; an odd bf16 row is padded with a zero.
pub fn words(dtype: Dtype, values: usize) -> usize {
    match dtype {
        Dtype::Float32 => values,
        Dtype::Bfloat16 => values.div_ceil(2),
    }
}

/// The bits of `value` rounded to bf16, nearest even; NaN stays NaN.
#[inline(always)]
pub(super) fn bf16_bits(value: f32) -> u32 {
    let quiet = (value.to_bits() >> 16) | 0x40;
    if value.is_nan() { quiet } else { bf16_finite(value) }
}

/// The same of a number that is finite, or an infinity.
#[inline(always)]
pub(super) fn bf16_finite(value: f32) -> u32 {
    let bits = value.to_bits();
    bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16
}

/// [`pack_row`] for callers that are compiled per instruction set themselves.
#[inline(always)]
pub(super) fn pack_into(dtype: Dtype, row: &[f32], words: &mut [u32]) {
    match dtype {
        Dtype::Float32 => words.copy_from_slice(bytemuck::cast_slice(row)),
        Dtype::Bfloat16 => {
            if let Some(last) = words.get_mut(row.len() / 2) {
                *last = 0;
            }
            // The first of a pair is the low half of its word: in memory the halves lie in order.
            for (half, value) in bytemuck::cast_slice_mut::<u32, u16>(words).iter_mut().zip(row) {
                *half = bf16_bits(*value) as u16;
            }
        }
    }
}

vectorised! {
    /// Packs a row into its words: `words` has [`words`]`(dtype, row.len())` elements.
    pub fn pack_row(dtype: Dtype, row: &[f32], words: &mut [u32]) {
        pack_into(dtype, row, words);
    }
}

vectorised! {
    /// Packs a row of first values and one of second values into words of bf16 pairs.
    pub(in crate::kernel::cpu) fn pack_pairs(low: &[f32], high: &[f32], words: &mut [u32]) {
        for ((low, high), word) in low.iter().zip(high).zip(words) {
            *word = bf16_bits(*low) | bf16_bits(*high) << 16;
        }
    }
}

vectorised! {
    /// Rounds a row to bf16 numbers.
    pub(super) fn halves(row: &[f32], halves: &mut [u16]) {
        for (half, value) in halves.iter_mut().zip(row) {
            *half = bf16_bits(*value) as u16;
        }
    }
}

#[cfg(target_endian = "big")]
compile_error!("rows are packed as on little-endian machines");

vectorised! {
    /// Rounds every value to bf16, nearest even.
    pub fn round_bf16(values: &mut [f32]) {
        for value in values {
            *value = f32::from_bits(bf16_bits(*value) << 16);
        }
    }
}

vectorised! {
    /// Spreads bf16 words out to f32 words, twice as many: of each `run` words first the low halves, then the high ones.
    pub(super) fn widen(words: &[u32], run: usize, wide: &mut [u32]) {
        for (words, wide) in words.chunks_exact(run).zip(wide.chunks_exact_mut(2 * run)) {
            let (low, high) = wide.split_at_mut(run);
            for ((word, low), high) in words.iter().zip(low).zip(high) {
                (*low, *high) = (word << 16, word & 0xffff_0000);
            }
        }
    }
}

/// The inverse of [`pack_row`]: the values as rounded.
pub fn unpack_row(dtype: Dtype, words: &[u32], row: &mut [f32]) {
    match dtype {
        Dtype::Float32 => row.copy_from_slice(bytemuck::cast_slice(words)),
        Dtype::Bfloat16 => {
            for (pair, word) in row.chunks_mut(2).zip(words) {
                pair[0] = f32::from_bits(word << 16);
                if let Some(high) = pair.get_mut(1) {
                    *high = f32::from_bits(word & 0xffff_0000);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_is_that_of_half() {
        let mut values: Vec<f32> = (0..200_000u32).map(|i| f32::from_bits(i.wrapping_mul(0x9e37_79b9))).collect();
        values.extend([0.0, -0.0, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, f32::MAX, f32::MIN_POSITIVE, 1e-45]);
        let expected: Vec<u32> = values.iter().map(|value| half::bf16::from_f32(*value).to_f32().to_bits()).collect();
        round_bf16(&mut values);
        assert_eq!(values.iter().map(|value| value.to_bits()).collect::<Vec<_>>(), expected);
    }

    #[test]
    fn odd_rows_survive_packing() {
        let row: Vec<f32> = (0..37).map(|i| i as f32 - 12.5).collect();
        for dtype in [Dtype::Float32, Dtype::Bfloat16] {
            let (mut packed, mut back) = (vec![0; words(dtype, row.len())], vec![0.0; row.len()]);
            pack_row(dtype, &row, &mut packed);
            unpack_row(dtype, &packed, &mut back);
            assert_eq!(row, back);
        }
    }
}
