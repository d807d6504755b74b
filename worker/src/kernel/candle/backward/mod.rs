//! [`Backward`] over any device of candle's: the formulas of the way back in its operations, without its graph of gradients.
//!
//! Weights are kept as they are trained; products widen them to f32 for their time. The one thing that is computed on the host is chance, see
//! [`update`].

mod attention;
mod states;
mod update;

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use candle_core::{D, DType, Tensor};
use candle_nn::ops::{rms_norm, sigmoid, softmax_last_dim, swiglu};

use super::{Candle, CandleDevice, Rows, number_type};
use crate::kernel::moment::Moment;
use crate::kernel::{Attention, Backward, Change, Gate, GateGradients, Result, Step, Trained, Weight, Weights};
use crate::numbers::{RowFormat, Values};
use attention::Whole;
pub use states::State;

/// A weight in f32.
fn wide(weight: &Tensor) -> Candle<Tensor> {
    weight.to_dtype(DType::F32)
}

/// Weights one below the other, in f32.
fn stacked(weights: &[&Tensor]) -> Candle<Tensor> {
    let wide = weights.iter().map(|weight| wide(weight)).collect::<Candle<Vec<_>>>()?;
    super::joined(wide)
}

/// Numbers in their own type, in this shape.
fn upload(values: &Values, shape: &[usize], device: &CandleDevice) -> Candle<Tensor> {
    match values {
        Values::Float32(values) => Tensor::from_slice(values, shape, &device.device),
        Values::Bfloat16(values) => Tensor::from_slice(values, shape, &device.device),
    }
}

/// All numbers of a tensor of f32 or bf16.
fn download(tensor: &Tensor) -> Candle<Values> {
    let flat = tensor.flatten_all()?;
    Ok(match flat.dtype() {
        DType::BF16 => Values::Bfloat16(flat.to_vec1()?),
        _ => Values::Float32(flat.to_vec1()?),
    })
}

/// The sum of all rows, as one row.
fn column_sums(rows: &Tensor) -> Candle<Tensor> {
    rows.sum_keepdim(0)
}

/// `g = sigmoid(z + b)`.
fn openness(z: &Tensor, bias: &Tensor) -> Candle<Tensor> {
    sigmoid(&z.broadcast_add(&wide(bias)?)?)
}

/// Rows that travel, in f32: rows of their numbers, or of a byte each with a scale behind them.
fn wire_rows(parts: &[Bytes], format: RowFormat, width: usize, device: &CandleDevice) -> Candle<Tensor> {
    let row_bytes = format.row_bytes(width);
    let count = parts.iter().map(Bytes::len).sum::<usize>() / row_bytes;
    if let RowFormat::Plain(dtype) = format {
        return wide(&Tensor::from_raw_buffer(&parts.concat(), number_type(dtype), &[count, width], &device.device)?);
    }
    let (mut codes, mut scales) = (Vec::with_capacity(count * width), Vec::with_capacity(count));
    for row in parts.iter().flat_map(|part| part.chunks_exact(row_bytes)) {
        let Some((numbers, scale)) = row.split_last_chunk() else { continue };
        codes.extend_from_slice(numbers);
        scales.push(f32::from_le_bytes(*scale));
    }
    // A row of all bytes, at a scale of one, is what they mean.
    let all: Vec<u8> = (0..=255).chain(1f32.to_le_bytes()).collect();
    let mut values = [0.0; 256];
    format.read(&all, &mut values);
    let numbers = states::meanings(&Tensor::from_vec(codes, (count, width), &device.device)?, &values)?;
    numbers.broadcast_mul(&Tensor::from_vec(scales, (count, 1), &device.device)?)
}

/// Attention weights of a sequence's rows, 1 × rows.
fn pooling_weights(rows: &Tensor, pooling: &Tensor) -> Candle<Tensor> {
    softmax_last_dim(&pooling.matmul(&rows.t()?)?)
}

/// Each sequence's rows with its first row, of `lengths` rows.
fn sequences<'a>(rows: &'a Tensor, lengths: &'a [usize]) -> impl Iterator<Item = Candle<Tensor>> + 'a {
    lengths.iter().scan(0, move |first, length| {
        *first += length;
        Some(rows.narrow(0, *first - length, *length))
    })
}

impl Backward for CandleDevice {
    /// In its own shape.
    type Trained = Tensor;
    type State = State;
    type Inputs = Tensor;
    /// `G · x` and `O · x`.
    type Gated = [Tensor; 2];

    fn train(&self, weights: Arc<Weights>) -> Result<Arc<Trained<Self>>> {
        let one = |(name, weight): (&String, &Weight)| Ok((name.clone(), upload(&weight.values, &weight.shape, self)?));
        Ok(Arc::new(weights.iter().map(one).collect::<Candle<_>>()?))
    }

    fn trained(&self, weights: &Arc<Trained<Self>>) -> Result<Arc<Weights>> {
        let one = |(name, tensor): (&String, &Tensor)| Ok((name.clone(), Weight::new(tensor.dims().to_vec(), download(tensor)?)));
        Ok(Arc::new(weights.iter().map(one).collect::<Candle<_>>()?))
    }

    fn dimensions(weight: &Tensor) -> &[usize] {
        weight.dims()
    }

    fn remember(&self, moment: Arc<Moment>) -> Result<State> {
        Ok(State::upload(&moment, self)?)
    }

    fn remembered(&self, state: &State) -> Result<Arc<Moment>> {
        Ok(Arc::new(state.download()?))
    }

    fn receive(&self, values: Vec<f32>, width: usize) -> Result<Rows> {
        let count = values.len() / width;
        Ok(Tensor::from_vec(values, (count, width), &self.device)?.into())
    }

    fn hand_over(&self, rows: Rows) -> Result<Vec<f32>> {
        Ok(rows.tensor()?.flatten_all()?.to_vec1()?)
    }

    fn size(rows: &Rows) -> usize {
        rows.0.as_ref().map_or(0, Tensor::elem_count)
    }

    fn normed_states(&self, parts: &[Bytes], format: RowFormat, width: usize, epsilon: f32) -> Result<Rows> {
        self.norm(&wire_rows(parts, format, width, self)?.into(), None, epsilon)
    }

    fn linear(&self, x: &Rows, weights: &[&Tensor], bias: Option<&Tensor>) -> Result<Rows> {
        let product = x.tensor()?.matmul(&stacked(weights)?.t()?)?;
        Ok(match bias {
            Some(bias) => product.broadcast_add(&wide(bias)?)?.into(),
            None => product.into(),
        })
    }

    fn linear_back(&self, dy: &Rows, weights: &[&Tensor]) -> Result<Rows> {
        Ok(dy.tensor()?.matmul(&stacked(weights)?)?.into())
    }

    fn inputs(&self, x: Rows) -> Result<Tensor> {
        Ok(x.tensor()?.clone())
    }

    fn gradient(&self, dy: &Rows, columns: Range<usize>, x: &Tensor) -> Result<Rows> {
        let dy = dy.tensor()?.narrow(1, columns.start, columns.len())?.contiguous()?;
        Ok(dy.t()?.matmul(x)?.into())
    }

    fn norm(&self, x: &Rows, weight: Option<&Tensor>, epsilon: f32) -> Result<Rows> {
        let x = x.tensor()?;
        let weight = weight.map_or_else(|| Tensor::ones(x.dims()[1], DType::F32, &self.device), wide)?;
        Ok(rms_norm(x, &weight, epsilon)?.into())
    }

    fn norm_back(&self, x: &Rows, weight: Option<&Tensor>, epsilon: f32, dy: &Rows) -> Result<(Rows, Rows)> {
        let (x, dy) = (x.tensor()?, dy.tensor()?);
        let r = (x.sqr()?.mean_keepdim(D::Minus1)? + f64::from(epsilon))?.sqrt()?.recip()?;
        let n = x.broadcast_mul(&r)?;
        let dw = column_sums(&(dy * &n)?)?;
        let dn = match weight {
            Some(weight) => dy.broadcast_mul(&wide(weight)?)?,
            None => dy.clone(),
        };
        let mean = (&dn * &n)?.mean_keepdim(D::Minus1)?;
        let dx = (dn - n.broadcast_mul(&mean)?)?.broadcast_mul(&r)?;
        Ok((dx.into(), dw.into()))
    }

    fn silu_mul(&self, gate_up: &Rows) -> Result<Rows> {
        Ok(swiglu(gate_up.tensor()?)?.into())
    }

    fn silu_mul_back(&self, gate_up: &Rows, dy: &Rows) -> Result<Rows> {
        let (halves, dy) = (gate_up.tensor()?.chunk(2, D::Minus1)?, dy.tensor()?);
        let (gate, up) = (halves[0].contiguous()?, &halves[1]);
        let s = sigmoid(&gate)?;
        let dup = ((dy * &gate)? * &s)?;
        // s · (1 + gate · (1 - s))
        let slope = ((gate * s.affine(-1.0, 1.0)?)? + 1.0)?.mul(&s)?;
        drop(s);
        let dgate = ((dy * up)? * slope)?;
        Ok(Tensor::cat(&[dgate, dup], 1)?.into())
    }

    fn attend_whole(&self, attention: Attention, angles: &Rows, qkv: &mut Rows, lengths: &[usize]) -> Result<Rows> {
        Ok(Whole::new(attention, angles.tensor()?, lengths)?.forward(qkv.tensor()?)?.into())
    }

    fn attend_whole_back(&self, attention: Attention, angles: &Rows, qkv: &Rows, lengths: &[usize], dy: &Rows) -> Result<Rows> {
        Ok(Whole::new(attention, angles.tensor()?, lengths)?.backward(qkv.tensor()?, dy.tensor()?)?.into())
    }

    fn gated(&self, gate: Gate<'_, Self>, x: &Rows, keep: bool) -> Result<(Rows, Option<[Tensor; 2]>)> {
        let [z, delta] = gate_products(&gate, x.tensor()?)?;
        let out = (openness(&z, gate.bias)? * &delta)?;
        Ok((out.into(), keep.then_some([z, delta])))
    }

    fn gated_back(&self, gate: Gate<'_, Self>, x: &Rows, kept: Option<[Tensor; 2]>, dy: Rows) -> Result<GateGradients<Rows>> {
        let (x, dy) = (x.tensor()?, dy.tensor()?);
        let [z, delta] = kept.map_or_else(|| gate_products(&gate, x), Ok)?;
        let g = openness(&z, gate.bias)?;
        drop(z);
        let ddelta = (dy * &g)?;
        // g · (1 - g) · Δ · dy
        let dz = ((&ddelta * g.affine(-1.0, 1.0)?)? * delta)?;
        drop(g);
        let dx = (ddelta.matmul(&wide(gate.output)?)? + dz.matmul(&wide(gate.gate)?)?)?;
        let (output, by_gate) = (ddelta.t()?.matmul(x)?, dz.t()?.matmul(x)?);
        Ok(GateGradients { x: dx.into(), output: output.into(), gate: by_gate.into(), bias: column_sums(&dz)?.into() })
    }

    fn pool(&self, rows: &Rows, pooling: &Tensor, lengths: &[usize]) -> Result<Rows> {
        let pooling = wide(pooling)?.unsqueeze(0)?;
        let pooled = sequences(rows.tensor()?, lengths).map(|rows| {
            let rows = rows?;
            pooling_weights(&rows, &pooling)?.matmul(&rows)
        });
        Ok(Tensor::cat(&pooled.collect::<Candle<Vec<_>>>()?, 0)?.into())
    }

    fn pool_back(&self, rows: &Rows, pooling: &Tensor, lengths: &[usize], dy: &Rows) -> Result<(Rows, Rows)> {
        let (pooling, dy) = (wide(pooling)?.unsqueeze(0)?, dy.tensor()?);
        let (mut drows, mut dpooling) = (Vec::with_capacity(lengths.len()), pooling.zeros_like()?);
        for (index, rows) in sequences(rows.tensor()?, lengths).enumerate() {
            let (rows, dy) = (rows?, dy.narrow(0, index, 1)?);
            let p = pooling_weights(&rows, &pooling)?;
            let dp = dy.matmul(&rows.t()?)?;
            let mean = (&p * &dp)?.sum_keepdim(1)?;
            let ds = (&p * dp.broadcast_sub(&mean)?)?;
            dpooling = (dpooling + ds.matmul(&rows)?)?;
            drows.push((p.t()?.matmul(&dy)? + ds.t()?.matmul(&pooling)?)?);
        }
        Ok((Tensor::cat(&drows, 0)?.into(), dpooling.into()))
    }

    fn spread(&self, rows: &Rows, at: &[u32], count: usize) -> Result<Rows> {
        let rows = rows.tensor()?;
        let zeros = Tensor::zeros((count, rows.dims()[1]), DType::F32, &self.device)?;
        Ok(zeros.index_add(&self.indices(at)?, rows, 0)?.into())
    }

    fn sum(&self, rows: &Rows) -> Result<Rows> {
        Ok(column_sums(rows.tensor()?)?.into())
    }

    fn add(&self, target: &mut Rows, rows: &Rows) -> Result<()> {
        *target = (target.tensor()? + rows.tensor()?)?.into();
        Ok(())
    }

    fn scale(&self, rows: &mut Rows, factor: f32) -> Result<()> {
        *rows = (rows.tensor()? * f64::from(factor))?.into();
        Ok(())
    }

    fn length<'a>(&self, parts: impl IntoIterator<Item = &'a Rows>) -> Result<f64> {
        // A row in f32, rows in f64.
        let squares = |rows: &Rows| rows.tensor()?.sqr()?.sum(D::Minus1)?.to_dtype(DType::F64)?.sum_all();
        let squares = parts.into_iter().map(squares).collect::<Candle<Vec<_>>>()?;
        Ok(Tensor::stack(&squares, 0)?.sum_all()?.to_scalar::<f64>()?.sqrt())
    }

    fn update(&self, step: &Step, changes: &mut [Change<'_, Self>]) -> Result<()> {
        Ok(changes.iter_mut().try_for_each(|change| update::update(step, change))?)
    }

    fn average(&self, average: &mut Tensor, weight: &Tensor, share: f32) -> Result<()> {
        let moved = ((wide(weight)? - &*average)? * f64::from(share))?;
        *average = (&*average + moved)?;
        Ok(())
    }
}

/// `G · x` and `O · x`.
fn gate_products(gate: &Gate<'_, CandleDevice>, x: &Tensor) -> Candle<[Tensor; 2]> {
    let product = |weight: &Tensor| x.matmul(&wide(weight)?.t()?);
    Ok([product(gate.gate)?, product(gate.output)?])
}
