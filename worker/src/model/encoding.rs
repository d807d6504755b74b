//! How a checkpoint stores values, and what they are.

use candle_core::CpuStorage;
use candle_core::quantized::GgmlDType;
use half::{bf16, f16};

/// How the values of a tensor are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoding {
    /// 32-bit floats.
    F32,
    /// IEEE half floats.
    F16,
    /// Brain floats.
    Bf16,
    /// Floats of 8 bits: 4 of exponent, 3 of mantissa, no infinity.
    F8E4M3,
    /// Blocks that candle decodes.
    Ggml(GgmlDType),
    /// Blocks of 32: f16 scale, 32 indices of 4 bits into [`IQ4_NL`].
    Iq4Nl,
}

/// What the indices of IQ4_NL stand for, as ggml publishes it.
const IQ4_NL: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

/// The value of every byte.
const F8_E4M3: [f32; 256] = f8_e4m3();

impl Encoding {
    /// Values of a block and its bytes.
    pub fn block(self) -> (usize, usize) {
        match self {
            Self::F32 => (1, 4),
            Self::F16 | Self::Bf16 => (1, 2),
            Self::F8E4M3 => (1, 1),
            Self::Ggml(blocks) => (blocks.block_size(), blocks.type_size()),
            Self::Iq4Nl => (32, 18),
        }
    }

    /// Bytes of `rows` rows of `cols` values, if a row is a whole number of blocks and the size fits.
    pub fn bytes(self, rows: usize, cols: usize) -> Option<usize> {
        let (values, bytes) = self.block();
        cols.is_multiple_of(values).then(|| (cols / values).checked_mul(bytes)?.checked_mul(rows)).flatten()
    }

    /// Writes the values of whole blocks: `values` is as long as `bytes` say. Candle's blocks begin at an even address.
    pub fn decode(self, bytes: &[u8], values: &mut [f32]) {
        match self {
            Self::F32 => each(bytes, values, f32::from_le_bytes),
            Self::F16 => each(bytes, values, |bytes| f16::from_le_bytes(bytes).to_f32()),
            Self::Bf16 => each(bytes, values, |bytes| bf16::from_le_bytes(bytes).to_f32()),
            Self::F8E4M3 => each(bytes, values, |[byte]| F8_E4M3[usize::from(byte)]),
            // An empty slice may begin anywhere.
            Self::Ggml(_) if values.is_empty() => {}
            Self::Ggml(blocks) => match blocks.from_data(bytes.into()).dequantize(values.len()) {
                Ok(CpuStorage::F32(decoded)) => values.copy_from_slice(&decoded),
                other => unreachable!("candle decodes blocks to f32: {other:?}"),
            },
            Self::Iq4Nl => blocks(bytes, values, |[a, b, indices @ ..]: &[u8; 18], values| {
                let scale = f16::from_le_bytes([*a, *b]).to_f32();
                let value = |index: u8| f32::from(IQ4_NL[usize::from(index)]) * scale;
                let (low, high) = values.split_at_mut(16);
                for ((byte, low), high) in indices.iter().zip(low).zip(high) {
                    (*low, *high) = (value(byte & 15), value(byte >> 4));
                }
            }),
        }
    }
}

/// Values of `N` bytes each.
fn each<const N: usize>(bytes: &[u8], values: &mut [f32], value: impl Fn([u8; N]) -> f32) {
    values.iter_mut().zip(bytes.as_chunks().0).for_each(|(target, bytes)| *target = value(*bytes));
}

/// Blocks of `N` bytes and 32 values each.
fn blocks<const N: usize>(bytes: &[u8], values: &mut [f32], decode: impl Fn(&[u8; N], &mut [f32; 32])) {
    bytes.as_chunks().0.iter().zip(values.as_chunks_mut().0).for_each(|(bytes, values)| decode(bytes, values));
}

const fn f8_e4m3() -> [f32; 256] {
    let (mut values, mut byte) = ([f32::NAN; 256], 0);
    while byte < 256 {
        let (exponent, fraction) = ((byte as u32 >> 3) & 15, (byte as u32 & 7) as f32 / 8.0);
        // Powers of two by the bits of an f32, whose exponent is biased by 127 where theirs is by 7.
        let size = match exponent {
            0 => fraction * f32::from_bits((127 - 6) << 23),
            _ => (1.0 + fraction) * f32::from_bits((127 - 7 + exponent) << 23),
        };
        if byte & 0x7f != 0x7f {
            values[byte] = if byte < 128 { size } else { -size };
        }
        byte += 1;
    }
    values
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_that_do_not_fit_are_refused() {
        assert_eq!(Encoding::Ggml(GgmlDType::Q4_1).bytes(3, 33), None);
        assert_eq!(Encoding::Ggml(GgmlDType::Q4K).bytes(3, 128), None);
        assert_eq!(Encoding::F32.bytes(usize::MAX, 2), None);
        assert_eq!(Encoding::Ggml(GgmlDType::Q8_0).bytes(2, 64), Some(136));
    }

    #[test]
    fn nothing_decodes_to_nothing() {
        Encoding::Ggml(GgmlDType::Q6K).decode(&[], &mut []);
    }
}
