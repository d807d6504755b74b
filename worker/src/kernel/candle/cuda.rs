//! What CUDA is asked for beside candle's operations.

use candle_core::backend::BackendStorage as _;
use candle_core::cuda_backend::cudarc::cublas::result::gemm_strided_batched_ex;
use candle_core::cuda_backend::cudarc::cublas::sys::{cublasComputeType_t, cublasGemmAlgo_t, cublasOperation_t, cudaDataType_t};
use candle_core::cuda_backend::cudarc::driver::sys::CUdevice_attribute;
use candle_core::cuda_backend::cudarc::driver::{DevicePtr as _, DevicePtrMut as _, result};
use candle_core::cuda_backend::{CudaStorage, WrapErr as _};
use candle_core::{CpuStorage, CustomOp2, Device, Layout, Result, Shape, bail};
use half::bf16;

/// `left · rightᵀ` of bf16 numbers, (batch ×) m × k and (batch ×) n × k, with sums and result in f32: candle's own product rounds its result.
pub struct Product;

impl CustomOp2 for Product {
    fn name(&self) -> &'static str {
        "product_in_f32"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        bail!("on a CPU bf16 numbers are widened first")
    }

    fn cuda_fwd(
        &self,
        left: &CudaStorage,
        left_layout: &Layout,
        right: &CudaStorage,
        right_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let (batch, [m, k]) = batched(left_layout)?;
        let (_, [n, _]) = batched(right_layout)?;
        if !left_layout.is_contiguous() {
            bail!("the left side of a product is not contiguous");
        }
        // Column by column, as cuBLAS reads it, the result is its own transpose: n × m = right · leftᵀ.
        let (order, leading) = match right_layout.stride() {
            [.., row, 1] => (cublasOperation_t::CUBLAS_OP_T, *row),
            [.., 1, column] => (cublasOperation_t::CUBLAS_OP_N, *column),
            strides => bail!("the right side of a product has strides {strides:?}"),
        };
        let device = left.device().clone();
        let left = left.as_cuda_slice::<bf16>()?.slice(left_layout.start_offset()..);
        let right = right.as_cuda_slice::<bf16>()?.slice(right_layout.start_offset()..);
        // SAFETY: the product writes all of it.
        let mut out = unsafe { device.alloc::<f32>(batch * m * n)? };
        let (stream, one, zero) = (device.cuda_stream(), 1.0f32, 0.0f32);
        {
            let ((a, _a), (b, _b), (c, _c)) = (right.device_ptr(&stream), left.device_ptr(&stream), out.device_ptr_mut(&stream));
            let stride = |count: usize| if batch > 1 { count as i64 } else { 0 };
            // SAFETY: sizes and strides are those of the slices, and the result has batch · m · n numbers.
            unsafe {
                gemm_strided_batched_ex(
                    *device.cublas_handle().handle(),
                    order,
                    cublasOperation_t::CUBLAS_OP_N,
                    n as i32,
                    m as i32,
                    k as i32,
                    (&raw const one).cast(),
                    a as *const _,
                    cudaDataType_t::CUDA_R_16BF,
                    leading as i32,
                    stride(n * k),
                    b as *const _,
                    cudaDataType_t::CUDA_R_16BF,
                    k as i32,
                    stride(m * k),
                    (&raw const zero).cast(),
                    c as *mut _,
                    cudaDataType_t::CUDA_R_32F,
                    n as i32,
                    stride(m * n),
                    batch as i32,
                    cublasComputeType_t::CUBLAS_COMPUTE_32F,
                    cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT_TENSOR_OP,
                )
            }
            .w()?;
        }
        let mut shape = left_layout.dims().to_vec();
        let last = shape.len() - 1;
        shape[last] = n;
        Ok((CudaStorage::wrap_cuda_slice(out, device), shape.into()))
    }
}

/// Matrices of a tensor, and rows and columns of each.
fn batched(layout: &Layout) -> Result<(usize, [usize; 2])> {
    match layout.dims() {
        [batch @ .., rows, columns] => Ok((batch.iter().product(), [*rows, *columns])),
        dims => bail!("no matrix has the shape {dims:?}"),
    }
}

/// The device's architecture, e.g. `cuda_sm90`.
pub fn architecture(device: &Device) -> String {
    let attribute = |attribute| match device {
        Device::Cuda(device) => device.cuda_stream().context().attribute(attribute).unwrap_or(0),
        _ => 0,
    };
    let major = attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR);
    let minor = attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR);
    format!("cuda_sm{major}{minor}")
}

/// Bytes that are free on it.
pub fn free_memory(device: &Device) -> Option<u64> {
    let Device::Cuda(_) = device else { return None };
    result::mem_get_info().ok().map(|(free, _)| free as u64)
}
