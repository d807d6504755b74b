//! Hidden states of one sequence, as they travel and as they lie in the cache.

use bytes::Bytes;
use carryon_crds::common::Taps;
use carryon_crds::pool::Dtype;
use half::bf16;
use half::slice::HalfFloatSliceExt as _;

use super::frames::{Frame, FrameError};
use super::wire::tap_names;
use crate::tensor_file;

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

/// Hidden states of one sequence at the taps that were asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SequenceStates {
    /// Place of the sequence in the request.
    pub index: usize,
    /// Tokens T.
    pub tokens: usize,
    /// Number type of the rows.
    pub dtype: Dtype,
    /// Per tap, layers as asked and `final` last: T rows of D numbers, little-endian.
    pub taps: Vec<Bytes>,
}

impl SequenceStates {
    /// Rows of one tap as f32, T × D; empty when there is no such tap.
    pub fn tap(&self, tap: usize) -> Vec<f32> {
        let bytes = self.taps.get(tap).map_or(&[][..], |bytes| bytes);
        let mut values = vec![0.0; bytes.len() / number_bytes(self.dtype)];
        from_bytes(bytes, self.dtype, &mut values);
        values
    }

    /// Bytes over all taps.
    pub fn bytes(&self) -> usize {
        self.taps.iter().map(Bytes::len).sum()
    }

    /// What precedes the rows of all taps in a safetensors file: tensors named by [`tap_names`], the sequence's index in the metadata.
    pub fn header(index: usize, tokens: usize, dtype: Dtype, taps: &Taps, hidden_size: usize) -> Bytes {
        let (names, shape) = (tap_names(taps), [tokens, hidden_size]);
        let tensors = names.iter().map(|name| (name.as_str(), wire_dtype(dtype), &shape[..]));
        tensor_file::header(&[("index", &index.to_string())], tensors).into()
    }

    /// The sequence as pieces of a safetensors file.
    pub fn encode(self, taps: &Taps, hidden_size: usize) -> Vec<Bytes> {
        let header = Self::header(self.index, self.tokens, self.dtype, taps, hidden_size);
        std::iter::once(header).chain(self.taps).collect()
    }

    /// Reads what [`Self::encode`] wrote; `lengths` are the tokens of each sequence of the request.
    pub fn decode(frame: &Frame, taps: &Taps, lengths: &[usize]) -> Result<Self, FrameError> {
        let index = frame.metadata_number("index")?;
        let names = tap_names(taps);
        let Some(&tokens) = lengths.get(index) else {
            let expected = format!("less than {}", lengths.len());
            return Err(FrameError::Metadata { name: "index", expected, found: Some(index.to_string()) });
        };
        let info = names.first().and_then(|name| frame.info(name));
        let (dtype, hidden_size) = match info.map(|info| (info.dtype, info.shape.as_slice())) {
            Some((safetensors::Dtype::BF16, &[_, hidden_size])) => (Dtype::Bfloat16, hidden_size),
            Some((safetensors::Dtype::F32, &[_, hidden_size])) => (Dtype::Float32, hidden_size),
            other => {
                return Err(FrameError::Tensor {
                    name: names.first().cloned().unwrap_or_default(),
                    expected: format!("BF16 or F32 [{tokens}, D]"),
                    found: format!("{other:?}"),
                });
            }
        };
        let taps = names.iter().map(|name| frame.tensor(name, wire_dtype(dtype), &[tokens, hidden_size])).collect::<Result<_, _>>()?;
        Ok(Self { index, tokens, dtype, taps })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn states(dtype: Dtype) -> SequenceStates {
        let rows = |start: f32| to_bytes(&[start, -start, 0.5, start * 3.0], dtype);
        SequenceStates { index: 1, tokens: 2, dtype, taps: vec![rows(1.0), rows(2.0)] }
    }

    #[test]
    fn states_survive_the_wire() {
        let taps = Taps { layers: vec![3], final_norm: true };
        for dtype in [Dtype::Bfloat16, Dtype::Float32] {
            let frame = Frame::parse(states(dtype).encode(&taps, 2).concat().into()).unwrap();
            let read = SequenceStates::decode(&frame, &taps, &[9, 2]).unwrap();
            assert_eq!(read, states(dtype));
            assert_eq!(read.tap(1), [2.0, -2.0, 0.5, 6.0]);
        }
    }

    #[test]
    fn refuses_an_index_or_a_length_that_was_not_asked_for() {
        let taps = Taps { layers: vec![3], final_norm: true };
        let frame = Frame::parse(states(Dtype::Float32).encode(&taps, 2).concat().into()).unwrap();
        assert!(SequenceStates::decode(&frame, &taps, &[2]).unwrap_err().to_string().contains("less than 1"));
        assert!(SequenceStates::decode(&frame, &taps, &[2, 3]).unwrap_err().to_string().contains("expected F32 [3, 2], found F32 [2, 2]"));
    }
}
