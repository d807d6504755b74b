//! Products whose sums are f32 whatever their factors are.

use candle_core::{DType, Device, Tensor};

use super::Candle;

/// `left · rightᵀ`: (batch ×) m × k and (batch ×) n × k of one number type; the result is f32.
pub fn multiply(left: &Tensor, right: &Tensor) -> Candle<Tensor> {
    // Products of bf16 numbers are exact in f32.
    let wide = |tensor: &Tensor| tensor.to_dtype(DType::F32);
    wide(left)?.matmul(&wide(right)?.t()?)
}

/// Device and kernel, as numerics name them.
pub fn name(device: &Device, number: &str) -> (String, String) {
    (format!("{:?}", device.location()).to_lowercase(), format!("candle_{number}"))
}
