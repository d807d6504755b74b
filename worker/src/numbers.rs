//! Numbers as bytes: as they travel, and as they lie in files.

use std::borrow::Cow;

use bytes::Bytes;
use carryon_crds::pool::Dtype;
use half::bf16;
use half::slice::HalfFloatSliceExt as _;

pub use crate::rows::RowFormat;

/// Numbers in memory, in as many bits as asked for.
#[derive(Clone, Debug, PartialEq)]
pub enum Values {
    /// As they are.
    Float32(Vec<f32>),
    /// Half of each.
    Bfloat16(Vec<bf16>),
}

impl Values {
    /// `count` zeros.
    pub fn zeros(count: usize, dtype: Dtype) -> Self {
        match dtype {
            Dtype::Float32 => Self::Float32(vec![0.0; count]),
            Dtype::Bfloat16 => Self::Bfloat16(vec![bf16::ZERO; count]),
        }
    }

    /// From little-endian bytes, as many as whole numbers take.
    pub fn from_bytes(bytes: &[u8], dtype: Dtype) -> Self {
        match dtype {
            Dtype::Float32 => Self::Float32(bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()),
            Dtype::Bfloat16 => Self::Bfloat16(bytes.as_chunks::<2>().0.iter().map(|bytes| bf16::from_le_bytes(*bytes)).collect()),
        }
    }

    /// As they lie in memory, which is as they lie in files: this worker runs on little-endian machines only.
    pub fn bytes(&self) -> &[u8] {
        match self {
            Self::Float32(values) => bytemuck::cast_slice(values),
            Self::Bfloat16(values) => bytemuck::cast_slice(values),
        }
    }

    /// How many.
    pub fn len(&self) -> usize {
        match self {
            Self::Float32(values) => values.len(),
            Self::Bfloat16(values) => values.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Their type.
    pub fn dtype(&self) -> Dtype {
        match self {
            Self::Float32(_) => Dtype::Float32,
            Self::Bfloat16(_) => Dtype::Bfloat16,
        }
    }

    /// The same numbers in `dtype`, rounded to nearest even.
    #[must_use]
    pub fn into_dtype(self, dtype: Dtype) -> Self {
        match (self, dtype) {
            (Self::Float32(values), Dtype::Bfloat16) => Self::Bfloat16(values.into_iter().map(bf16::from_f32).collect()),
            (Self::Bfloat16(values), Dtype::Float32) => Self::Float32(values.into_iter().map(bf16::to_f32).collect()),
            (values, _) => values,
        }
    }

    /// All of them.
    pub fn floats(&self) -> Cow<'_, [f32]> {
        match self {
            Self::Float32(values) => Cow::Borrowed(values),
            Self::Bfloat16(values) => Cow::Owned(values.to_f32_vec()),
        }
    }

    /// All of them, to change; in f32 from here on.
    pub fn floats_mut(&mut self) -> &mut Vec<f32> {
        loop {
            match self {
                Self::Float32(values) => return values,
                Self::Bfloat16(values) => *self = Self::Float32(values.to_f32_vec()),
            }
        }
    }

    /// As many as `out` has places, from number `first` on.
    pub fn read(&self, first: usize, out: &mut [f32]) {
        match self {
            Self::Float32(values) => out.copy_from_slice(&values[first..][..out.len()]),
            Self::Bfloat16(values) => values[first..][..out.len()].convert_to_f32_slice(out),
        }
    }
}

impl From<Vec<f32>> for Values {
    fn from(values: Vec<f32>) -> Self {
        Self::Float32(values)
    }
}

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

/// The same as f32, uncopied: this worker runs on little-endian machines only.
pub fn into_bytes(values: Vec<f32>) -> Bytes {
    struct Floats(Vec<f32>);
    impl AsRef<[u8]> for Floats {
        fn as_ref(&self) -> &[u8] {
            bytemuck::cast_slice(&self.0)
        }
    }
    Bytes::from_owner(Floats(values))
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
