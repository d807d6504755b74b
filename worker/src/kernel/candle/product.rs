//! Products of rows with weights, and where they go.

use candle_core::{D, DType, Tensor};
use candle_nn::ops::{rms_norm, swiglu};

use super::{Candle, CandleDevice, gemm, joined};
use crate::kernel::{Activation, Left, Part, Sink};

/// See [`crate::kernel::Backend::product`].
pub fn product(left: Left<'_, CandleDevice>, right: &[Part<'_, CandleDevice>], sink: Sink<'_, CandleDevice>) -> Candle<()> {
    let mut products = Vec::with_capacity(right.len());
    let mut first = 0;
    for Part { rows, matrix, norm } in right.iter().filter(|part| part.rows > 0) {
        let mut values = values(&left)?.narrow(0, first, *rows)?;
        first += rows;
        if let Left::Normed(_, epsilon) = left {
            let ones = || Tensor::ones(values.dims()[1], DType::F32, values.device());
            values = rms_norm(&values.contiguous()?, &norm.map_or_else(ones, |norm| Ok(norm.clone()))?, epsilon)?;
        }
        products.push(multiply(&values, &matrix.widened()?)?);
    }
    let Some(part) = right.first().filter(|_| !products.is_empty()) else { return Ok(()) };
    put(joined(products)?, part.matrix.dtype(), sink)
}

/// See [`crate::kernel::Backend::product_heads`]; `right` is heads × n × k.
pub fn product_heads(left: Left<'_, CandleDevice>, right: &Tensor, sink: Sink<'_, CandleDevice>) -> Candle<()> {
    let (heads, n, k) = right.dims3()?;
    let values = values(&left)?;
    let rows = values.dims()[0];
    let product = multiply(&values.reshape((rows, heads, k))?.transpose(0, 1)?, right)?;
    put(product.transpose(0, 1)?.reshape((rows, heads * n))?, right.dtype(), sink)
}

/// `left · rightᵀ` in f32: (batch ×) m × k, rounded to the number type of (batch ×) n × k.
pub fn multiply(left: &Tensor, right: &Tensor) -> Candle<Tensor> {
    gemm::multiply(&left.to_dtype(right.dtype())?.contiguous()?, right)
}

fn values<'a>(left: &Left<'a, CandleDevice>) -> Candle<&'a Tensor> {
    let (Left::Plain(values) | Left::Normed(values, _) | Left::Packed(values)) = left;
    values.tensor()
}

fn put(product: Tensor, dtype: DType, sink: Sink<'_, CandleDevice>) -> Candle<()> {
    match sink {
        Sink::Store(out) => *out = product.into(),
        Sink::Add(out) => *out = (out.tensor()? + product)?.into(),
        Sink::Pack(out) => *out = product.to_dtype(dtype)?.into(),
        Sink::Gated(out, activation) => {
            let gated = match activation {
                Activation::Silu => swiglu(&product)?,
                Activation::GeluTanh => {
                    let halves = product.chunk(2, D::Minus1)?;
                    (halves[0].gelu()? * &halves[1])?
                }
            };
            *out = gated.to_dtype(dtype)?.into();
        }
    }
    Ok(())
}
