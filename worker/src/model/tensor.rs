//! Tensors as they lie in a checkpoint, and their values.

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
    /// Blocks of 32: f16 scale, f16 minimum, 32 values of 4 bits.
    Q4_1,
    /// Blocks of 32: f16 scale, 32 values of 8 bits.
    Q8_0,
}

impl Encoding {
    /// Values of a block and its bytes.
    pub fn block(self) -> (usize, usize) {
        match self {
            Self::F32 => (1, 4),
            Self::F16 | Self::Bf16 => (1, 2),
            Self::Q4_1 => (32, 20),
            Self::Q8_0 => (32, 34),
        }
    }

    /// Bytes of `rows` rows of `cols` values, if a row is a whole number of blocks and the size fits.
    pub fn bytes(self, rows: usize, cols: usize) -> Option<usize> {
        let (values, bytes) = self.block();
        cols.is_multiple_of(values).then(|| (cols / values).checked_mul(bytes)?.checked_mul(rows)).flatten()
    }

    fn decode(self, bytes: &[u8], values: &mut [f32]) {
        match self {
            Self::F32 => each(bytes, values, f32::from_le_bytes),
            Self::F16 => each(bytes, values, |bytes| f16::from_le_bytes(bytes).to_f32()),
            Self::Bf16 => each(bytes, values, |bytes| bf16::from_le_bytes(bytes).to_f32()),
            Self::Q4_1 => blocks(bytes, values, |[a, b, c, d, bytes @ ..]: &[u8; 20], values| {
                let (scale, minimum) = (f16::from_le_bytes([*a, *b]).to_f32(), f16::from_le_bytes([*c, *d]).to_f32());
                let (low, high) = values.split_at_mut(16);
                for ((byte, low), high) in bytes.iter().zip(low).zip(high) {
                    *low = f32::from(byte & 15) * scale + minimum;
                    *high = f32::from(byte >> 4) * scale + minimum;
                }
            }),
            Self::Q8_0 => blocks(bytes, values, |[a, b, bytes @ ..]: &[u8; 34], values| {
                let scale = f16::from_le_bytes([*a, *b]).to_f32();
                values.iter_mut().zip(bytes).for_each(|(value, byte)| *value = f32::from(*byte as i8) * scale);
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

/// A matrix (or vector: one row) of a checkpoint.
pub struct Tensor {
    /// Rows.
    pub rows: usize,
    /// Values of a row.
    pub cols: usize,
    encoding: Encoding,
    bytes: Vec<u8>,
    /// Heads whose rows lie interleaved, as GGUF keeps queries and keys of the Llama architecture.
    interleaved_heads: Option<usize>,
}

impl Tensor {
    /// A tensor over `bytes`, whose length is `encoding.bytes(rows, cols)`.
    pub fn new(rows: usize, cols: usize, encoding: Encoding, bytes: Vec<u8>) -> Self {
        debug_assert_eq!(Some(bytes.len()), encoding.bytes(rows, cols));
        Self { rows, cols, encoding, bytes, interleaved_heads: None }
    }

    /// The same tensor read in Hugging Face's row order: within each of `heads` heads, file rows (0, 1, 2, 3, …) are rows
    /// (0, d/2, 1, d/2 + 1, …).
    pub fn with_interleaved_heads(self, heads: usize) -> Self {
        Self { interleaved_heads: Some(heads), ..self }
    }

    /// Writes the values of `row` into `values` (`cols` long).
    pub fn row(&self, row: usize, values: &mut [f32]) {
        let row = match self.interleaved_heads {
            Some(heads) => {
                let head_dim = self.rows / heads;
                let (head, index) = (row / head_dim, row % head_dim);
                head * head_dim + 2 * (index % (head_dim / 2)) + index / (head_dim / 2)
            }
            None => row,
        };
        let row_bytes = self.bytes.len() / self.rows;
        self.encoding.decode(&self.bytes[row * row_bytes..][..row_bytes], values);
    }

    /// All values of a vector.
    pub fn vector(&self) -> Vec<f32> {
        let mut values = vec![0.0; self.cols];
        self.row(0, &mut values);
        values
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_decode_by_their_formulas() {
        let mut q4_1 = f16::from_f32(0.5).to_le_bytes().to_vec();
        q4_1.extend(f16::from_f32(-3.0).to_le_bytes());
        q4_1.extend((0..16u8).map(|i| i | ((15 - i) << 4)));
        let values = Tensor::new(1, 32, Encoding::Q4_1, q4_1).vector();
        assert_eq!((values[0], values[15], values[16], values[31]), (-3.0, 4.5, 4.5, -3.0));

        let mut q8_0 = f16::from_f32(0.25).to_le_bytes().to_vec();
        q8_0.extend((0..32).map(|i: i8| (i - 16) as u8));
        let values = Tensor::new(1, 32, Encoding::Q8_0, q8_0).vector();
        assert_eq!((values[0], values[31]), (-4.0, 3.75));
    }

    #[test]
    fn interleaved_heads_are_put_back_in_halves() {
        let bytes = (0..8).flat_map(|i| (i as f32).to_le_bytes()).collect();
        let tensor = Tensor::new(8, 1, Encoding::F32, bytes).with_interleaved_heads(2);
        let mut value = [0.0];
        let order: Vec<f32> = (0..8)
            .map(|row| {
                tensor.row(row, &mut value);
                value[0]
            })
            .collect();
        assert_eq!(order, [0.0, 2.0, 1.0, 3.0, 4.0, 6.0, 5.0, 7.0]);
    }

    #[test]
    fn sizes_that_do_not_fit_are_refused() {
        assert_eq!(Encoding::Q4_1.bytes(3, 33), None);
        assert_eq!(Encoding::F32.bytes(usize::MAX, 2), None);
        assert_eq!(Encoding::Q8_0.bytes(2, 64), Some(136));
    }
}
