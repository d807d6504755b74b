//! A block of a weight in few bits, in ggml's forms.

use half::f16;

use super::Bits;

/// Values of a block.
pub const BLOCK: usize = 32;

/// Value `i` is `factor · codes[i] + least`.
pub struct Block {
    bits: Bits,
    pub factor: f16,
    /// Zero where the form has none.
    pub least: f16,
    /// Of Q8 as two's complement.
    pub codes: [u8; BLOCK],
}

impl Block {
    /// The nearest block: as ggml makes Q8_0 and Q4_1, with codes for the factor as it is rounded.
    pub fn of(bits: Bits, values: &[f32; BLOCK]) -> Self {
        let (low, high) = values.iter().fold((f32::INFINITY, f32::NEG_INFINITY), |(low, high), value| (low.min(*value), high.max(*value)));
        let (factor, least) = match bits {
            Bits::Q8 => (high.max(-low) / 127.0, 0.0),
            Bits::Q4 => ((high - low) / 15.0, low),
        };
        let (factor, least) = (f16::from_f32(factor), f16::from_f32(least));
        let inverse = if factor == f16::ZERO { 0.0 } else { 1.0 / factor.to_f32() };
        let codes = values.map(|value| {
            let nearest = ((value - least.to_f32()) * inverse).round();
            match bits {
                Bits::Q8 => nearest.clamp(-127.0, 127.0) as i8 as u8,
                Bits::Q4 => nearest.clamp(0.0, 15.0) as u8,
            }
        });
        Self { bits, factor, least, codes }
    }

    /// A value, before it is rounded to bf16.
    pub fn value(&self, at: usize) -> f32 {
        let code = match self.bits {
            Bits::Q8 => f32::from(self.codes[at] as i8),
            Bits::Q4 => f32::from(self.codes[at]),
        };
        self.factor.to_f32() * code + self.least.to_f32()
    }

    /// Writes ggml's bytes.
    pub fn write(&self, bytes: &mut [u8]) {
        bytes[..2].copy_from_slice(&self.factor.to_le_bytes());
        match self.bits {
            Bits::Q8 => bytes[2..].copy_from_slice(&self.codes),
            Bits::Q4 => {
                bytes[2..4].copy_from_slice(&self.least.to_le_bytes());
                let (first, second) = self.codes.split_at(BLOCK / 2);
                bytes[4..].iter_mut().zip(first.iter().zip(second)).for_each(|(byte, (low, high))| *byte = low | (high << 4));
            }
        }
    }
}
