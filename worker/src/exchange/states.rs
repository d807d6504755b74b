//! Hidden states of one sequence, as they travel and as they lie in the cache.

use bytes::Bytes;
use carryon_crds::common::Taps;

use super::frames::{Frame, FrameError};
use super::wire::tap_names;
use crate::numbers::RowFormat;
use crate::tensor_file;

/// Hidden states of one sequence at the taps that were asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SequenceStates {
    /// Place of the sequence in the request.
    pub index: usize,
    /// Tokens T.
    pub tokens: usize,
    /// How the rows of each tap are written.
    pub formats: Vec<RowFormat>,
    /// Per tap, layers as asked and `final` last: T rows of D numbers.
    pub taps: Vec<Bytes>,
}

impl SequenceStates {
    /// Rows of one tap as f32, T × D; empty when there is no such tap.
    pub fn tap(&self, tap: usize) -> Vec<f32> {
        let (Some(rows), Some(format)) = (self.taps.get(tap), self.formats.get(tap)) else { return Vec::new() };
        let row_bytes = rows.len() / self.tokens.max(1);
        let mut values = Vec::new();
        for row in rows.chunks_exact(row_bytes.max(1)) {
            let mut out = vec![0.0; format.width(row_bytes)];
            format.read(row, &mut out);
            values.extend(out);
        }
        values
    }

    /// Bytes over all taps.
    pub fn bytes(&self) -> usize {
        self.taps.iter().map(Bytes::len).sum()
    }

    /// What precedes the rows of all taps in a safetensors file: tensors named by [`tap_names`], the sequence's index in the metadata.
    pub fn header(index: usize, tokens: usize, formats: &[RowFormat], taps: &Taps, hidden_size: usize) -> Bytes {
        let tensors: Vec<_> =
            formats.iter().map(|format| format.tensor(hidden_size)).map(|(dtype, columns)| (dtype, [tokens, columns])).collect();
        let names = tap_names(taps);
        let named = names.iter().zip(&tensors).map(|(name, (dtype, shape))| (name.as_str(), *dtype, &shape[..]));
        tensor_file::header(&[("index", &index.to_string())], named).into()
    }

    /// The sequence as pieces of a safetensors file.
    pub fn encode(self, taps: &Taps, hidden_size: usize) -> Vec<Bytes> {
        let header = Self::header(self.index, self.tokens, &self.formats, taps, hidden_size);
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
        let wrong = |name: &String| FrameError::Tensor {
            name: name.clone(),
            expected: format!("rows of {tokens} tokens in BF16, F32 or U8, of one width"),
            found: frame.info(name).map_or_else(|| "nothing".to_owned(), |info| format!("{:?} {:?}", info.dtype, info.shape)),
        };
        let (mut formats, mut rows, mut widths) = (Vec::new(), Vec::new(), Vec::new());
        for name in &names {
            let info = frame.info(name).filter(|info| info.shape.len() == 2 && info.shape[0] == tokens).ok_or_else(|| wrong(name))?;
            let (format, width) = RowFormat::of_tensor(info.dtype, info.shape[1]).ok_or_else(|| wrong(name))?;
            widths.push(width);
            if widths[0] != width {
                return Err(wrong(name));
            }
            formats.push(format);
            rows.push(frame.tensor(name, info.dtype, &info.shape)?);
        }
        Ok(Self { index, tokens, formats, taps: rows })
    }
}

#[cfg(test)]
mod tests {
    use carryon_crds::pool::Dtype;

    use super::*;
    use crate::numbers::to_bytes;

    fn states(dtype: Dtype) -> SequenceStates {
        let rows = |start: f32| to_bytes(&[start, -start, 0.5, start * 3.0], dtype);
        SequenceStates { index: 1, tokens: 2, formats: vec![RowFormat::Plain(dtype); 2], taps: vec![rows(1.0), rows(2.0)] }
    }

    #[test]
    fn states_survive_the_wire() {
        let taps = Taps { layers: vec![3], final_norm: true };
        let mut small = states(Dtype::Bfloat16);
        small.formats[0] = RowFormat::Float8;
        small.taps[0] = RowFormat::Float8.convert(small.taps[0].clone(), Dtype::Bfloat16, 2);
        for states in [states(Dtype::Bfloat16), states(Dtype::Float32), small] {
            let frame = Frame::parse(states.clone().encode(&taps, 2).concat().into()).unwrap();
            let read = SequenceStates::decode(&frame, &taps, &[9, 2]).unwrap();
            assert_eq!(read, states);
            assert_eq!((read.tap(0), read.tap(1)), (vec![1.0, -1.0, 0.5, 3.0], vec![2.0, -2.0, 0.5, 6.0]));
        }
    }

    #[test]
    fn refuses_an_index_a_length_or_a_width_that_was_not_asked_for() {
        let taps = Taps { layers: vec![3], final_norm: true };
        let refused = |states: SequenceStates, lengths: &[usize]| {
            let frame = Frame::parse(states.encode(&taps, 2).concat().into()).unwrap();
            SequenceStates::decode(&frame, &taps, lengths).unwrap_err().to_string()
        };
        assert!(refused(states(Dtype::Float32), &[2]).contains("less than 1"));
        let other = refused(states(Dtype::Float32), &[2, 3]);
        assert!(other.contains("rows of 3 tokens") && other.ends_with("found F32 [2, 2]"), "{other}");
    }
}
