//! Products whose sums are f32 whatever their factors are, and what a device says of itself.

use candle_core::{DType, Device, Tensor};

use super::Candle;

/// `left · rightᵀ`: (batch ×) m × k, contiguous, and (batch ×) n × k of one number type, which may be the transpose of what is contiguous; the result
/// is f32.
pub fn multiply(left: &Tensor, right: &Tensor) -> Candle<Tensor> {
    #[cfg(feature = "cuda")]
    if left.device().is_cuda() && left.dtype() == DType::BF16 {
        return left.apply_op2_no_bwd(right, &super::cuda::Product);
    }
    // Products of bf16 numbers are exact in f32.
    let wide = |tensor: &Tensor| tensor.to_dtype(DType::F32);
    wide(left)?.matmul(&wide(right)?.t()?)
}

/// Device and kernel, as numerics name them.
pub fn name(device: &Device, number: &str) -> (String, String) {
    #[cfg(feature = "cuda")]
    if device.is_cuda() {
        return (super::cuda::architecture(device), format!("cublas_{number}"));
    }
    (format!("{:?}", device.location()).to_lowercase(), format!("candle_{number}"))
}

/// Bytes that are free on a device with memory of its own.
pub fn free_memory(device: &Device) -> Option<u64> {
    #[cfg(feature = "cuda")]
    return super::cuda::free_memory(device);
    #[cfg(not(feature = "cuda"))]
    {
        let _ = device;
        None
    }
}
