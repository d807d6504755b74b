//! Tensors as they lie in a checkpoint, read row by row.

use super::encoding::Encoding;

/// Rows and columns of a block that has a scale of its own.
pub const SCALED_BLOCK: usize = 128;

/// A matrix (or vector: one row) of a checkpoint.
pub struct Tensor {
    /// Rows.
    pub rows: usize,
    /// Values of a row.
    pub cols: usize,
    encoding: Encoding,
    bytes: Vec<u8>,
    /// What the values of each block are multiplied by, ⌈rows / 128⌉ × ⌈cols / 128⌉.
    block_scales: Option<Vec<f32>>,
}

impl Tensor {
    /// A tensor over `bytes`, whose length is `encoding.bytes(rows, cols)`.
    pub fn new(rows: usize, cols: usize, encoding: Encoding, bytes: Vec<u8>) -> Self {
        debug_assert_eq!(Some(bytes.len()), encoding.bytes(rows, cols));
        Self { rows, cols, encoding, bytes, block_scales: None }
    }

    /// The same tensor with the values of each block of [`SCALED_BLOCK`]² multiplied by their scale: ⌈rows / 128⌉ × ⌈cols / 128⌉.
    pub fn with_block_scales(self, scales: &Self) -> Self {
        debug_assert_eq!((scales.rows, scales.cols), (self.rows.div_ceil(SCALED_BLOCK), self.cols.div_ceil(SCALED_BLOCK)));
        let mut values = vec![0.0; scales.rows * scales.cols];
        values.chunks_exact_mut(scales.cols.max(1)).enumerate().for_each(|(row, values)| scales.row(row, values));
        Self { block_scales: Some(values), ..self }
    }

    /// Writes the values of `row` into `values` (`cols` long).
    pub fn row(&self, row: usize, values: &mut [f32]) {
        let row_bytes = self.bytes.len() / self.rows;
        self.encoding.decode(&self.bytes[row * row_bytes..][..row_bytes], values);
        if let Some(scales) = &self.block_scales {
            let blocks = self.cols.div_ceil(SCALED_BLOCK);
            for (values, scale) in values.chunks_mut(SCALED_BLOCK).zip(&scales[row / SCALED_BLOCK * blocks..]) {
                values.iter_mut().for_each(|value| *value *= scale);
            }
        }
    }

    /// All values of a vector.
    pub fn vector(&self) -> Vec<f32> {
        let mut values = vec![0.0; self.cols];
        self.row(0, &mut values);
        values
    }
}
