//! What an optimizer remembers of a weight, on the device.

use candle_core::{DType, Tensor};

use super::super::{Candle, CandleDevice};
use super::update::rounded;
use super::{download, upload};
use crate::kernel::moment::{BLOCK, Dice, Map, Moment, Table};

/// Numbers in a row, as [`Moment`] keeps them on the host.
pub enum State {
    /// In f32 or bf16.
    Plain(Tensor),
    /// In blocks of 8 bits.
    Int8 {
        /// What codes mean.
        map: Map,
        /// Numbers without those that fill up the last block.
        count: usize,
        /// Blocks × [`BLOCK`].
        codes: Tensor,
        /// Blocks × 1.
        scales: Tensor,
    },
}

impl State {
    pub(super) fn upload(moment: &Moment, device: &CandleDevice) -> Candle<Self> {
        match moment {
            Moment::Plain(values) => Ok(Self::Plain(upload(values, &[values.len()], device)?)),
            Moment::Int8 { map, codes, scales } => {
                let (count, blocks) = (codes.len(), scales.len());
                let mut codes = codes.clone();
                codes.resize(blocks * BLOCK, 0);
                let codes = Tensor::from_vec(codes, (blocks, BLOCK), &device.device)?;
                Ok(Self::Int8 { map: *map, count, codes, scales: Tensor::from_slice(scales, (blocks, 1), &device.device)? })
            }
        }
    }

    pub(super) fn download(&self) -> Candle<Moment> {
        match self {
            Self::Plain(values) => Ok(Moment::Plain(download(values)?)),
            Self::Int8 { map, count, codes, scales } => {
                let mut codes: Vec<u8> = codes.flatten_all()?.to_vec1()?;
                codes.truncate(*count);
                Ok(Moment::Int8 { map: *map, codes, scales: scales.flatten_all()?.to_vec1()? })
            }
        }
    }

    /// The numbers in f32.
    pub(super) fn values(&self) -> Candle<Tensor> {
        match self {
            Self::Plain(values) => values.to_dtype(DType::F32),
            Self::Int8 { map, count, codes, scales } => {
                meanings(codes, &map.table().values)?.broadcast_mul(scales)?.flatten_all()?.narrow(0, 0, *count)
            }
        }
    }

    /// Becomes these numbers, rounded by this chance or to the nearest code.
    pub(super) fn keep(&mut self, values: Tensor, dice: Dice) -> Candle<()> {
        match self {
            Self::Plain(kept) if kept.dtype() == DType::BF16 => *kept = rounded(&values, dice)?,
            Self::Plain(kept) => *kept = values,
            Self::Int8 { map, codes, scales, .. } => {
                let missing = codes.elem_count() - values.elem_count();
                let values = values.pad_with_zeros(0, 0, missing)?.reshape(codes.shape())?;
                *scales = values.abs()?.max_keepdim(1)?;
                let share = scales.gt(0.0)?.where_cond(&scales.recip()?, &scales.zeros_like()?)?;
                *codes = nearest(&values.broadcast_mul(&share)?, map.table())?;
            }
        }
        Ok(())
    }
}

/// What codes of 8 bits mean, each of 256 values. The last code as a byte would be a place that candle leaves empty.
pub(super) fn meanings(codes: &Tensor, values: &[f32; 256]) -> Candle<Tensor> {
    let places = codes.flatten_all()?.to_dtype(DType::U32)?;
    Tensor::new(values, codes.device())?.index_select(&places, 0)?.reshape(codes.shape())
}

/// The code of the nearest of a table's values: how many bounds lie below, found by halving.
fn nearest(values: &Tensor, table: &Table) -> Candle<Tensor> {
    let (flat, device) = (values.flatten_all()?, values.device());
    let bounds = Tensor::new(&table.bounds, device)?;
    let mut code = Tensor::zeros(flat.shape(), DType::U32, device)?;
    for step in [128u32, 64, 32, 16, 8, 4, 2, 1] {
        // Bound number `code + step - 1` is the last of as many as the higher code has below it.
        let last = code.broadcast_add(&Tensor::new(&[step - 1], device)?)?;
        let higher = code.broadcast_add(&Tensor::new(&[step], device)?)?;
        code = bounds.index_select(&last, 0)?.lt(&flat)?.where_cond(&higher, &code)?;
    }
    code.to_dtype(DType::U8)?.reshape(values.shape())
}
