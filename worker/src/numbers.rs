//! Numbers as bytes: as they travel, and as they lie in files.

use bytes::Bytes;
use carryon_crds::pool::Dtype;
use half::bf16;
use half::slice::HalfFloatSliceExt as _;

/// Bytes of one number.
pub fn number_bytes(dtype: Dtype) -> usize {
    match dtype {
        Dtype::Bfloat16 => 2,
        Dtype::Float32 => 4,
    }
}

/// The safetensors name of a number type.
pub fn wire_dtype(dtype: Dtype) -> safetensors::Dtype {
    match dtype {
        Dtype::Bfloat16 => safetensors::Dtype::BF16,
        Dtype::Float32 => safetensors::Dtype::F32,
    }
}

/// Numbers to little-endian bytes of `dtype`; bf16 rounds to nearest even, which changes nothing for numbers already rounded.
pub fn to_bytes(values: &[f32], dtype: Dtype) -> Bytes {
    match dtype {
        Dtype::Float32 => bytemuck::cast_slice::<f32, u8>(values).to_vec().into(),
        Dtype::Bfloat16 => {
            let mut bytes = vec![0u8; values.len() * 2];
            for (target, value) in bytes.as_chunks_mut::<2>().0.iter_mut().zip(values) {
                *target = bf16::from_f32(*value).to_le_bytes();
            }
            bytes.into()
        }
    }
}

/// Little-endian bytes of `dtype` to numbers; `out` has as many places as `bytes` has numbers, the shorter one counts.
pub fn from_bytes(bytes: &[u8], dtype: Dtype, out: &mut [f32]) {
    match dtype {
        Dtype::Float32 => {
            for (value, bytes) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
                *value = f32::from_le_bytes(*bytes);
            }
        }
        Dtype::Bfloat16 => match bytemuck::try_cast_slice::<u8, bf16>(bytes) {
            Ok(halves) if halves.len() == out.len() => halves.convert_to_f32_slice(out),
            _ => {
                for (value, bytes) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                    *value = bf16::from_le_bytes(*bytes).to_f32();
                }
            }
        },
    }
}
