//! [`Backend`] over any device of candle's, in its operations and candle-nn's fused ones.
//!
//! It runs on candle's CPU device in the tests, against the same oracles as our own kernels, and on CUDA where it is built in. Sums are f32: candle's
//! own bf16 product rounds its result, so products of bf16 numbers go through [`gemm`].

mod attention;
mod backward;
mod blocks;
#[cfg(feature = "cuda")]
mod cuda;
mod gemm;
mod logits;
mod pages;
mod places;
mod product;

use std::borrow::Cow;
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use candle_core::quantized::QTensor;
use candle_core::{DType, Device, Tensor};
use candle_nn::ops::{rms_norm, sigmoid};
use candle_nn::rotary_emb::rope_thd;
use carryon_crds::pool::Dtype;
use half::bf16;

use super::{Aim, Attention, Backend, Fill, Left, Outline, PageLayout, Part, Result, Rotation, Sink, Span, Stored};
pub use backward::State;
pub use pages::Pages;
pub use places::Places;

type Candle<T> = candle_core::Result<T>;

/// A device of candle's.
#[derive(Clone, Debug)]
pub struct CandleDevice {
    device: Device,
}

/// A tensor of two dimensions, once something was put into it.
#[derive(Clone, Debug, Default)]
pub struct Rows(Option<Tensor>);

/// A weight, n × k; a transpose is another view of the same numbers.
#[derive(Clone, Debug)]
pub enum Matrix {
    /// In the number type of its products.
    Plain(Tensor),
    /// In blocks, and whether it is turned.
    Blocks(Arc<QTensor>, bool),
}

/// A weight of each head, heads × n × k.
#[derive(Clone, Debug)]
pub struct Heads(Tensor);

impl Rows {
    fn tensor(&self) -> Candle<&Tensor> {
        self.0.as_ref().ok_or_else(|| candle_core::Error::Msg("rows are read before they are written".to_owned()))
    }
}

impl From<Tensor> for Rows {
    fn from(tensor: Tensor) -> Self {
        Self(Some(tensor))
    }
}

impl CandleDevice {
    /// candle's `device`.
    pub fn new(device: Device) -> Self {
        Self { device }
    }

    /// The CUDA device of this number.
    ///
    /// # Errors
    /// There is none, or the worker is built without CUDA.
    pub fn cuda(ordinal: usize) -> Result<Self> {
        Ok(Self::new(Device::new_cuda(ordinal)?))
    }

    fn weight(&self, n: usize, k: usize, dtype: Dtype, fill: Fill<'_>) -> Candle<Tensor> {
        match dtype {
            Dtype::Bfloat16 => Tensor::from_vec(filled(n, k, fill, bf16::from_f32), (n, k), &self.device),
            Dtype::Float32 => Tensor::from_vec(filled(n, k, fill, |value| value), (n, k), &self.device),
        }
    }

    fn indices(&self, values: &[u32]) -> Candle<Tensor> {
        indices(values, &self.device)
    }
}

fn indices(values: &[u32], device: &Device) -> Candle<Tensor> {
    Tensor::from_slice(values, values.len(), device)
}

/// candle's name of a number type.
fn number_type(dtype: Dtype) -> DType {
    match dtype {
        Dtype::Bfloat16 => DType::BF16,
        Dtype::Float32 => DType::F32,
    }
}

/// These rows, one part after the other; a single part is not copied.
fn joined(mut parts: Vec<Tensor>) -> Candle<Tensor> {
    if parts.len() == 1 { Ok(parts.remove(0)) } else { Tensor::cat(&parts, 0) }
}

/// Writes `rows` over the rows `at` of `target`, in place.
fn scatter(target: &Tensor, at: &Tensor, rows: &Tensor) -> Candle<()> {
    target.scatter_set(&at.unsqueeze(1)?.broadcast_as(rows.shape())?.contiguous()?, rows, 0)
}

/// `cap · tanh(x / cap)`.
fn capped(values: &Tensor, cap: f32) -> Candle<Tensor> {
    (values / f64::from(cap))?.tanh()? * f64::from(cap)
}

fn round(rows: Tensor, dtype: Dtype) -> Candle<Tensor> {
    rows.to_dtype(number_type(dtype))?.to_dtype(DType::F32)
}

fn bytes_of(tensor: &Tensor) -> Candle<Bytes> {
    let flat = tensor.flatten_all()?;
    Ok(match tensor.dtype() {
        DType::BF16 => flat.to_vec1::<bf16>()?.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>().into(),
        _ => bytemuck::cast_slice::<f32, u8>(&flat.to_vec1::<f32>()?).to_vec().into(),
    })
}

/// All rows of a weight, from as many threads as there are cores.
fn filled<T: Copy + Default + Send>(n: usize, k: usize, fill: Fill<'_>, convert: impl Fn(f32) -> T + Sync) -> Vec<T> {
    let mut values = vec![T::default(); n * k];
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let rows = n.div_ceil(threads).max(1);
    std::thread::scope(|scope| {
        for (index, block) in values.chunks_mut(rows * k.max(1)).enumerate() {
            let convert = &convert;
            scope.spawn(move || {
                let mut row = vec![0.0; k];
                for (offset, target) in block.chunks_exact_mut(k).enumerate() {
                    fill(index * rows + offset, &mut row);
                    target.iter_mut().zip(&row).for_each(|(target, value)| *target = convert(*value));
                }
            });
        }
    });
    values
}

impl Backend for CandleDevice {
    type Rows = Rows;
    type Packed = Rows;
    type Matrix = Matrix;
    type Heads = Heads;
    type Vector = Tensor;
    type Pages = Pages;
    type Places = Places;

    fn name(&self, dtype: Dtype) -> (String, String) {
        let number = number_type(dtype).as_str();
        gemm::name(&self.device, number)
    }

    fn beside(&self) -> Self {
        self.clone()
    }

    fn free_memory(&self) -> Option<u64> {
        gemm::free_memory(&self.device)
    }

    fn finish(&self) -> Result<()> {
        Ok(self.device.synchronize()?)
    }

    fn matrix(&self, n: usize, k: usize, stored: Stored, fill: Fill<'_>) -> Result<Matrix> {
        Ok(match stored {
            Stored::As(dtype) => Matrix::Plain(self.weight(n, k, dtype, fill)?),
            Stored::Blocks(bits) => blocks::matrix(n, k, bits, fill, &self.device)?,
        })
    }

    fn gate_up(&self, width: usize, k: usize, stored: Stored, fill: Fill<'_>) -> Result<Matrix> {
        self.matrix(2 * width, k, stored, fill)
    }

    fn heads(&self, heads: usize, n: usize, k: usize, dtype: Dtype, fill: Fill<'_>) -> Result<Heads> {
        Ok(Heads(self.weight(heads * n, k, dtype, fill)?.reshape((heads, n, k))?))
    }

    fn transposed(&self, matrix: &Matrix) -> Result<Matrix> {
        Ok(match matrix {
            Matrix::Plain(tensor) => Matrix::Plain(tensor.t()?),
            Matrix::Blocks(blocks, turned) => Matrix::Blocks(blocks.clone(), !turned),
        })
    }

    fn vector(&self, values: &[f32]) -> Result<Tensor> {
        Ok(Tensor::from_slice(values, values.len(), &self.device)?)
    }

    fn shape(matrix: &Matrix) -> (usize, usize) {
        match matrix {
            Matrix::Plain(tensor) => (tensor.dims()[0], tensor.dims()[1]),
            Matrix::Blocks(blocks, turned) => {
                let (n, k) = (blocks.shape().dims()[0], blocks.shape().dims()[1]);
                if *turned { (k, n) } else { (n, k) }
            }
        }
    }

    fn bytes(matrix: &Matrix) -> usize {
        match matrix {
            Matrix::Plain(tensor) => tensor.elem_count() * tensor.dtype().size_in_bytes(),
            Matrix::Blocks(blocks, _) => blocks.storage_size_in_bytes(),
        }
    }

    fn count(rows: &Rows) -> usize {
        rows.0.as_ref().map_or(0, |rows| rows.dims()[0])
    }

    fn write(&self, values: &[f32], width: usize) -> Result<Rows> {
        Ok(Tensor::from_slice(values, (values.len() / width, width), &self.device)?.into())
    }

    fn read<'a>(&self, rows: &'a Rows) -> Result<Cow<'a, [f32]>> {
        Ok(Cow::Owned(rows.tensor()?.flatten_all()?.to_vec1()?))
    }

    fn read_bytes(&self, rows: &Rows, dtype: Dtype) -> Result<Bytes> {
        Ok(bytes_of(&rows.tensor()?.to_dtype(number_type(dtype))?)?)
    }

    fn read_matrix(&self, matrix: &Matrix, rows: Range<usize>) -> Result<Bytes> {
        Ok(bytes_of(&matrix.rows(&rows.map(|row| row as u32).collect::<Vec<_>>())?)?)
    }

    fn embed(&self, table: &Matrix, tokens: &[u32], scale: f32, out: &mut Rows) -> Result<()> {
        let rows = table.rows(tokens)?.to_dtype(DType::F32)?;
        *out = if scale == 1.0 { rows.into() } else { (rows * f64::from(scale))?.into() };
        Ok(())
    }

    fn product(&self, left: Left<'_, Self>, right: &[Part<'_, Self>], sink: Sink<'_, Self>) -> Result<()> {
        Ok(product::product(left, right, sink)?)
    }

    fn product_heads(&self, left: Left<'_, Self>, right: &Heads, sink: Sink<'_, Self>) -> Result<()> {
        Ok(product::product_heads(left, &right.0, sink)?)
    }

    fn angles(&self, rotation: &Rotation, positions: &[u32], out: &mut Rows) -> Result<()> {
        let pairs = rotation.pairs();
        let mut values = vec![0.0; positions.len() * 2 * pairs];
        // All cosines, then all sines: each half is contiguous, as what reads it wants.
        let (cosines, sines) = values.split_at_mut(positions.len() * pairs);
        for (position, (cosine, sine)) in positions.iter().zip(cosines.chunks_exact_mut(pairs).zip(sines.chunks_exact_mut(pairs))) {
            rotation.at(*position as usize, cosine, sine);
        }
        *out = self.write(&values, pairs)?;
        Ok(())
    }

    fn rotate(&self, rows: &mut Rows, columns: usize, head_dim: usize, angles: &Rows) -> Result<()> {
        let (values, angles) = (rows.tensor()?, angles.tensor()?);
        let (count, pairs) = (values.dims()[0], angles.dims()[1]);
        let heads = values.narrow(1, 0, columns)?.reshape((1, count, columns / head_dim, head_dim))?;
        let own = heads.narrow(3, 0, 2 * pairs)?.contiguous()?;
        let mut rotated = rope_thd(&own, &angles.narrow(0, 0, count)?, &angles.narrow(0, count, count)?)?;
        if 2 * pairs < head_dim {
            rotated = Tensor::cat(&[rotated, heads.narrow(3, 2 * pairs, head_dim - 2 * pairs)?], 3)?;
        }
        Ok(values.slice_set(&rotated.reshape((count, columns))?.contiguous()?, 1, 0)?)
    }

    fn add_bias(&self, rows: &mut Rows, bias: &Tensor) -> Result<()> {
        *rows = rows.tensor()?.broadcast_add(bias)?.into();
        Ok(())
    }

    fn norm_columns(&self, rows: &mut Rows, columns: Range<usize>, weight: &Tensor, epsilon: f32) -> Result<()> {
        let values = rows.tensor()?;
        let (count, width) = (values.dims()[0], weight.elem_count());
        let own = values.narrow(1, columns.start, columns.len())?.reshape((count, columns.len() / width, width))?;
        let normed = rms_norm(&own.contiguous()?, weight, epsilon)?.reshape((count, columns.len()))?;
        Ok(values.slice_set(&normed, 1, columns.start)?)
    }

    fn add_normed(&self, target: &mut Rows, rows: &Rows, weight: &Tensor, epsilon: f32) -> Result<()> {
        *target = (target.tensor()? + rms_norm(rows.tensor()?, weight, epsilon)?)?.into();
        Ok(())
    }

    fn add_scaled(&self, target: &mut Rows, rows: &Rows, at: &[u32], factors: &[f32]) -> Result<()> {
        let factors = Tensor::from_slice(factors, (factors.len(), 1), &self.device)?;
        let scaled = rows.tensor()?.broadcast_mul(&factors)?;
        *target = target.tensor()?.index_add(&self.indices(at)?, &scaled, 0)?.into();
        Ok(())
    }

    fn softcap(&self, logits: &mut Rows, cap: f32) -> Result<()> {
        *logits = capped(logits.tensor()?, cap)?.into();
        Ok(())
    }

    fn pages(&self, layout: PageLayout, count: usize) -> Result<Pages> {
        Ok(Pages::new(layout, count, &self.device))
    }

    fn take_page(&self, pages: &mut Pages, page: u32) -> Result<()> {
        Ok(pages.reach(page as usize)?)
    }

    fn copy_page(&self, pages: &mut Pages, from: u32, to: u32) -> Result<()> {
        Ok(pages.copy(from as usize, to as usize)?)
    }

    /// Arenas do not shrink: the page is used again.
    fn give_page(&self, _pages: &mut Pages, _page: u32) {}

    fn places(&self, attention: Attention, spans: &[Span<'_>]) -> Result<Places> {
        Ok(Places::new(self, attention, spans)?)
    }

    fn append(&self, pages: &mut Pages, layer: usize, rows: &Rows, column: usize, places: &Places) -> Result<()> {
        Ok(pages.append(layer, &rows.tensor()?.narrow(1, column, pages.layout().width())?, places)?)
    }

    fn attend(&self, pages: &Pages, layer: usize, rows: &Rows, places: &Places, out: &mut Rows) -> Result<()> {
        *out = attention::attend(pages, layer, rows.tensor()?, places)?.into();
        Ok(())
    }

    fn tap(&self, rows: &Rows, which: Option<&[u32]>, norm: Option<(&Tensor, f32)>, dtype: Dtype) -> Result<Rows> {
        if which.is_some_and(<[u32]>::is_empty) {
            return Ok(Rows::default());
        }
        let mut rows = match which {
            Some(which) => rows.tensor()?.index_select(&self.indices(which)?, 0)?,
            None => rows.tensor()?.clone(),
        };
        if let Some((weight, epsilon)) = norm {
            rows = rms_norm(&rows, weight, epsilon)?;
        }
        Ok(round(rows, dtype)?.into())
    }

    fn pack(&self, rows: &Rows, which: Range<usize>, dtype: Dtype) -> Result<Rows> {
        // A copy of its own: a view would keep all rows.
        Ok(rows.tensor()?.narrow(0, which.start, which.len())?.to_dtype(number_type(dtype))?.copy()?.into())
    }

    fn unpack(&self, parts: &[&Rows], _width: usize, _dtype: Dtype) -> Result<Rows> {
        let parts = parts.iter().map(|part| part.tensor()).collect::<Candle<Vec<_>>>()?;
        Ok(Tensor::cat(&parts, 0)?.to_dtype(DType::F32)?.into())
    }

    fn gate(&self, z: &Rows, biases: &[(usize, &Tensor)], delta: &mut Rows) -> Result<()> {
        let (z, mut first, mut gates) = (z.tensor()?, 0, Vec::new());
        for (rows, bias) in biases.iter().filter(|(rows, _)| *rows > 0) {
            gates.push(sigmoid(&z.narrow(0, first, *rows)?.broadcast_add(bias)?)?);
            first += rows;
        }
        *delta = (delta.tensor()? * Tensor::cat(&gates, 0)?)?.into();
        Ok(())
    }

    fn combine(&self, y: &mut Rows, at: &[u32], alpha: &[f32], delta: &Rows, dtype: Dtype) -> Result<()> {
        let (y, alpha) = (y.tensor()?, Tensor::from_slice(alpha, (alpha.len(), 1), &self.device)?);
        let at = self.indices(at)?;
        let sum = (y.index_select(&at, 0)? + delta.tensor()?.broadcast_mul(&alpha)?)?;
        Ok(scatter(y, &at, &round(sum, dtype)?)?)
    }

    fn greedy(&self, logits: &Rows) -> Result<Vec<Option<u32>>> {
        Ok(logits::greedy(logits.tensor()?)?)
    }

    fn outline(&self, logits: &Rows, looks: &[(u32, f32)]) -> Result<Outline> {
        Ok(logits::outline(logits.tensor()?, looks)?)
    }

    fn blocks(&self, logits: &Rows, which: &[(u32, u32)]) -> Result<Vec<f32>> {
        Ok(logits::blocks(logits.tensor()?, which)?)
    }

    fn losses(
        &self,
        y: &Rows,
        lm_head: &Matrix,
        backward: Option<&Matrix>,
        aim: Aim<'_, Self>,
        softcap: Option<f32>,
    ) -> Result<(Vec<f32>, Option<Rows>)> {
        Ok(logits::losses(y.tensor()?, lm_head, backward, &aim, softcap)?)
    }
}
