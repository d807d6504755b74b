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
    /// Heads whose rows lie interleaved, as GGUF keeps queries and keys of the Llama architecture.
    interleaved_heads: Option<usize>,
    /// What the values of each block are multiplied by, ⌈rows / 128⌉ × ⌈cols / 128⌉.
    block_scales: Option<Vec<f32>>,
}

impl Tensor {
    /// A tensor over `bytes`, whose length is `encoding.bytes(rows, cols)`.
    pub fn new(rows: usize, cols: usize, encoding: Encoding, bytes: Vec<u8>) -> Self {
        debug_assert_eq!(Some(bytes.len()), encoding.bytes(rows, cols));
        Self { rows, cols, encoding, bytes, interleaved_heads: None, block_scales: None }
    }

    /// The same tensor read in Hugging Face's row order: within each of `heads` heads, file rows (0, 1, 2, 3, …) are rows
    /// (0, d/2, 1, d/2 + 1, …).
    pub fn with_interleaved_heads(self, heads: usize) -> Self {
        Self { interleaved_heads: Some(heads), ..self }
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

#[cfg(test)]
mod tests {
    use super::*;

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
}
