//! Hidden states of one sequence, as they travel and as they lie in the cache.

use bytes::Bytes;
use carryon_crds::common::Taps;
use carryon_crds::pool::Dtype;

use super::frames::{Frame, FrameError};
use super::wire::tap_names;
use crate::numbers::{from_bytes, number_bytes, wire_dtype};
use crate::tensor_file;

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
    use crate::numbers::to_bytes;

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
