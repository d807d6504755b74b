//! Rows of hidden states as bytes: as numbers of the model's type, or as one byte a number with a scale a row.

use std::sync::LazyLock;

use bytes::Bytes;
use carryon_crds::pool::Dtype;
use float8::F8E4M3;

use crate::numbers::{from_bytes, number_bytes, wire_dtype};

/// Bytes of a row's scale, an f32 behind its numbers.
const SCALE_BYTES: usize = 4;
/// Largest number of the type.
const LARGEST: f32 = 448.0;
const NOT_A_NUMBER: u8 = 0x7f;

/// How a row of D numbers is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowFormat {
    /// Little-endian numbers.
    Plain(Dtype),
    /// D numbers of 8 bits (E4M3: 4 of exponent, 3 of mantissa), then what they are multiplied by: a power of two, so that nothing but the 8 bits
    /// rounds.
    Float8,
}

impl RowFormat {
    /// Bytes of a row of `width` numbers.
    pub fn row_bytes(self, width: usize) -> usize {
        match self {
            Self::Plain(dtype) => width * number_bytes(dtype),
            Self::Float8 => width + SCALE_BYTES,
        }
    }

    /// Numbers of a row of so many bytes.
    pub fn width(self, row_bytes: usize) -> usize {
        match self {
            Self::Plain(dtype) => row_bytes / number_bytes(dtype),
            Self::Float8 => row_bytes.saturating_sub(SCALE_BYTES),
        }
    }

    /// Type and columns of a safetensors tensor of such rows.
    pub fn tensor(self, width: usize) -> (safetensors::Dtype, usize) {
        match self {
            Self::Plain(dtype) => (wire_dtype(dtype), width),
            Self::Float8 => (safetensors::Dtype::U8, width + SCALE_BYTES),
        }
    }

    /// What a tensor of this type and so many columns holds, and the numbers of its rows.
    pub fn of_tensor(dtype: safetensors::Dtype, columns: usize) -> Option<(Self, usize)> {
        match dtype {
            safetensors::Dtype::BF16 => Some((Self::Plain(Dtype::Bfloat16), columns)),
            safetensors::Dtype::F32 => Some((Self::Plain(Dtype::Float32), columns)),
            safetensors::Dtype::U8 => Some((Self::Float8, columns.checked_sub(SCALE_BYTES)?)),
            _ => None,
        }
    }

    /// Numbers of one row; `out` has as many places as it has numbers.
    pub fn read(self, row: &[u8], out: &mut [f32]) {
        match (self, row.split_last_chunk::<SCALE_BYTES>()) {
            (Self::Plain(dtype), _) => from_bytes(row, dtype, out),
            (Self::Float8, Some((numbers, scale))) => {
                let scale = f32::from_le_bytes(*scale);
                out.iter_mut().zip(numbers).for_each(|(value, byte)| *value = FLOATS[usize::from(*byte)] * scale);
            }
            (Self::Float8, None) => {}
        }
    }

    /// Rows of `width` numbers of `dtype` in this format.
    pub fn convert(self, rows: Bytes, dtype: Dtype, width: usize) -> Bytes {
        if self != Self::Float8 {
            return rows;
        }
        let mut values = vec![0.0; width];
        let mut out = Vec::with_capacity(rows.len() / number_bytes(dtype) / width.max(1) * self.row_bytes(width));
        for row in rows.chunks_exact(width * number_bytes(dtype)) {
            from_bytes(row, dtype, &mut values);
            let scale = scale(&values);
            let byte = |value: &f32| F8E4M3::from_f32(value / scale).to_bits();
            match scale.is_finite() {
                true => out.extend(values.iter().map(byte)),
                false => out.resize(out.len() + width, NOT_A_NUMBER),
            }
            out.extend(scale.to_le_bytes());
        }
        out.into()
    }
}

/// The least power of two that a row's numbers, divided by it, fit the type. Not finite when one of them is not.
fn scale(values: &[f32]) -> f32 {
    // In this order NaN is the largest of all.
    match values.iter().map(|value| value.abs()).max_by(f32::total_cmp).unwrap_or(0.0) {
        0.0 => 1.0,
        largest if largest.is_finite() => (largest / LARGEST).log2().ceil().max(-100.0).exp2(),
        largest => largest,
    }
}

/// All numbers of the type.
static FLOATS: LazyLock<[f32; 256]> = LazyLock::new(|| std::array::from_fn(|byte| F8E4M3::from_bits(byte as u8).to_f32()));

#[cfg(test)]
mod tests {
    use super::*;
    use crate::numbers::to_bytes;

    fn through(values: &[f32]) -> Vec<f32> {
        let rows = RowFormat::Float8.convert(to_bytes(values, Dtype::Float32), Dtype::Float32, values.len());
        assert_eq!(rows.len(), RowFormat::Float8.row_bytes(values.len()));
        let mut out = vec![0.0; values.len()];
        RowFormat::Float8.read(&rows, &mut out);
        out
    }

    #[test]
    fn a_row_keeps_four_bits_of_each_number_whatever_its_size() {
        for size in [1e-20, 1e-3, 1.0, 300.0, 1e20] {
            let values: Vec<f32> = (0..512).map(|index| size * ((index as f32 * 0.37).sin() + 0.01)).collect();
            let largest = values.iter().fold(0.0, |largest: f32, value| largest.max(value.abs()));
            for (found, value) in through(&values).iter().zip(&values) {
                // Half of the last of four bits; below the type's normal numbers half of its smallest.
                let bound = (value.abs() / 16.0).max(largest / LARGEST * 2.0 / 1024.0);
                assert!((found - value).abs() <= bound, "{found} for {value}");
            }
        }
    }

    #[test]
    fn rows_have_scales_of_their_own_and_what_is_no_number_stays_none() {
        assert_eq!(through(&[0.0, -0.0]), [0.0, 0.0]);
        assert_eq!(through(&[448.0, -448.0, 0.5]), [448.0, -448.0, 0.5]);
        assert_eq!(through(&[448.1, 1.0]), [448.0, 1.0]);
        for broken in [f32::NAN, f32::INFINITY] {
            assert!(through(&[1.0, broken, 2.0]).iter().all(|value| value.is_nan()));
        }
        let two = RowFormat::Float8.convert(to_bytes(&[1000.0, 1e-6], Dtype::Float32), Dtype::Float32, 1);
        let mut out = [0.0];
        RowFormat::Float8.read(&two[5..], &mut out);
        assert!((out[0] / 1e-6 - 1.0).abs() < 0.07, "{out:?}");
    }

    #[test]
    fn bits_are_those_of_the_crate_for_every_byte() {
        assert_eq!(FLOATS[0x7e], LARGEST);
        assert!(FLOATS[usize::from(NOT_A_NUMBER)].is_nan());
        assert_eq!(FLOATS[0x38], 1.0);
    }
}
