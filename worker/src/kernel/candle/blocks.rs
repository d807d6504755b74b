//! Weights in blocks of fewer bits: ggml's, in candle's tensors. A product widens the whole matrix to bf16 for its time.

use std::borrow::Cow;
use std::sync::Arc;

use candle_core::quantized::{GgmlDType, QStorage, QTensor};
use candle_core::{DType, Device, Tensor};
use carryon_crds::pool::Dtype;

use super::{Candle, Matrix, filled, indices, number_type};
use crate::kernel::block::{BLOCK, Block};
use crate::kernel::{Bits, Fill};

/// A weight of `n` rows of `k` values. One whose rows are not whole blocks is kept as bf16 numbers of the same values.
pub fn matrix(n: usize, k: usize, bits: Bits, fill: Fill<'_>, device: &Device) -> Candle<Matrix> {
    if !k.is_multiple_of(BLOCK) {
        let rounded = |row: usize, values: &mut [f32]| {
            fill(row, values);
            for values in values.chunks_mut(BLOCK) {
                let mut whole = [0.0; BLOCK];
                whole[..values.len()].copy_from_slice(values);
                let block = Block::of(bits, &whole);
                values.iter_mut().enumerate().for_each(|(at, value)| *value = block.value(at));
            }
        };
        let values = filled(n, k, &rounded, half::bf16::from_f32);
        return Ok(Matrix::Plain(Tensor::from_vec(values, (n, k), device)?));
    }
    let (dtype, block_bytes) = match bits {
        Bits::Q8 => (GgmlDType::Q8_0, 34),
        Bits::Q4 => (GgmlDType::Q4_1, 20),
    };
    let mut bytes = vec![0u8; n * k / BLOCK * block_bytes];
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let rows = n.div_ceil(threads).max(1);
    std::thread::scope(|scope| {
        for (index, part) in bytes.chunks_mut(rows * (k / BLOCK * block_bytes).max(1)).enumerate() {
            scope.spawn(move || {
                let mut row = vec![0.0; k];
                for (offset, target) in part.chunks_exact_mut(k / BLOCK * block_bytes).enumerate() {
                    fill(index * rows + offset, &mut row);
                    for (target, values) in target.chunks_exact_mut(block_bytes).zip(row.as_chunks::<BLOCK>().0) {
                        Block::of(bits, values).write(target);
                    }
                }
            });
        }
    });
    Ok(Matrix::Blocks(Arc::new(QTensor::new(QStorage::from_data(Cow::Owned(bytes), device, dtype)?, (n, k))?), false))
}

impl Matrix {
    /// Number type of the products.
    pub(super) fn dtype(&self) -> DType {
        match self {
            Self::Plain(tensor) => tensor.dtype(),
            Self::Blocks(..) => number_type(Dtype::Bfloat16),
        }
    }

    /// n × k numbers.
    pub(super) fn widened(&self) -> Candle<Tensor> {
        match self {
            Self::Plain(tensor) => Ok(tensor.clone()),
            Self::Blocks(blocks, turned) => {
                let tensor = blocks.dequantize(&blocks.device())?.to_dtype(DType::BF16)?;
                if *turned { tensor.t() } else { Ok(tensor) }
            }
        }
    }

    /// Some rows of a matrix that is not turned, in the number type of the products.
    pub(super) fn rows(&self, which: &[u32]) -> Candle<Tensor> {
        match self {
            Self::Plain(tensor) => tensor.index_select(&indices(which, tensor.device())?, 0),
            Self::Blocks(blocks, _) => blocks.embedding(&indices(which, &blocks.device())?)?.to_dtype(DType::BF16),
        }
    }
}
