//! Heads that read several bases: what a gateway carries between their pools while an answer is made.
//!
//! | route | request, a stream | answer, a stream |
//! |---|---|---|
//! | `POST /v1/follow` | a line with a [`FollowRequest`], then lines with [`FollowTokens`] | frames of [`TapRows`] |
//! | `POST /v1/generate-mixed` | a line with a [`super::wire::GenerateRequest`], then frames of [`TapRows`] | as of `POST /v1/generate`; of a head that pools a text, its scores |
//!
//! Both answers begin as soon as the pool has memory for the whole sequence, and before any of it has run: a gateway asks one pool after the other, and
//! sends on only when all have begun. It ends by ending its streams. Who has nothing to say for [`TICK`] says nothing, in a line or frame of its own,
//! lest it is taken for one that went away.

use std::time::Duration;

use bytes::Bytes;
use carryon_crds::common::Taps;
use serde::{Deserialize, Serialize};

use super::frames::{Frame, FrameError};
use crate::numbers::RowFormat;
use crate::tensor_file;

/// Rows of a sequence that a pool keeps for a gateway that has not taken them yet, or of a gateway until they run.
pub const ROWS_AHEAD: usize = 128;
/// After so long without anything to say, a gateway says that it is there.
pub const TICK: Duration = Duration::from_secs(10);

/// Asks for the tap states of a sequence that goes on with tokens which are not known yet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FollowRequest {
    /// Token ids, at least one.
    pub prompt: Vec<u32>,
    /// Most tokens that may come behind it.
    pub max_tokens: u32,
    /// Where to read.
    pub taps: Taps,
}

/// The next tokens of the sequence; none where there is nothing to say.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FollowTokens {
    /// Token ids.
    pub tokens: Vec<u32>,
}

impl FollowTokens {
    /// As a line.
    pub fn line(&self) -> Bytes {
        // A list of numbers: writing it cannot fail.
        let mut line = serde_json::to_vec(self).unwrap_or_default();
        line.push(b'\n');
        line.into()
    }
}

/// Rows of positions that follow each other, at some taps: a safetensors file with a tensor `tap.{i}` for each, and `first` in its metadata.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TapRows {
    /// Position of the first row.
    pub first: usize,
    /// Positions.
    pub rows: usize,
    /// Of each tap, how its rows are written, and the rows.
    pub taps: Vec<(RowFormat, Bytes)>,
}

impl TapRows {
    /// As a frame; `widths` are the numbers of a row of each tap.
    pub fn encode(&self, widths: &[usize]) -> Bytes {
        let names: Vec<String> = (0..self.taps.len()).map(name).collect();
        let shapes: Vec<_> = self.taps.iter().zip(widths).map(|((format, _), width)| format.tensor(*width)).collect();
        let shapes: Vec<_> = shapes.into_iter().map(|(dtype, columns)| (dtype, [self.rows, columns])).collect();
        let tensors = names.iter().zip(&shapes).map(|(name, (dtype, shape))| (name.as_str(), *dtype, &shape[..]));
        let mut bytes = tensor_file::header(&[("first", &self.first.to_string())], tensors);
        self.taps.iter().for_each(|(_, rows)| bytes.extend_from_slice(rows));
        bytes.into()
    }

    /// Reads what [`Self::encode`] wrote, of taps of these widths.
    pub fn decode(frame: &Frame, widths: &[usize]) -> Result<Self, FrameError> {
        let first = frame.metadata_number("first")?;
        let rows = frame.info(&name(0)).and_then(|info| info.shape.first()).copied().unwrap_or(0);
        let tap = |(tap, width): (usize, &usize)| {
            let (name, info) = (name(tap), frame.info(&name(tap)));
            let format = info.and_then(|info| match info.shape[..] {
                [found, columns] if found == rows => RowFormat::of_tensor(info.dtype, columns).filter(|(_, found)| found == width),
                _ => None,
            });
            let (Some(info), Some((format, _))) = (info, format) else {
                let found = info.map_or_else(|| "nothing".to_owned(), |info| format!("{:?} {:?}", info.dtype, info.shape));
                return Err(FrameError::Tensor { name, expected: format!("{rows} rows of {width} numbers in BF16, F32 or U8"), found });
            };
            Ok((format, frame.tensor(&name, info.dtype, &info.shape)?))
        };
        Ok(Self { first, rows, taps: widths.iter().enumerate().map(tap).collect::<Result<_, _>>()? })
    }

    /// Takes the first `rows` of them, all if there are fewer.
    pub fn split_to(&mut self, rows: usize) -> Self {
        let rows = rows.min(self.rows);
        let part = |(format, bytes): &mut (RowFormat, Bytes)| (*format, bytes.split_to(bytes.len() / self.rows.max(1) * rows));
        let taken = Self { first: self.first, rows, taps: self.taps.iter_mut().map(part).collect() };
        self.first += rows;
        self.rows -= rows;
        taken
    }

    /// The taps of all parts, which are of the same positions.
    pub fn join(parts: impl Iterator<Item = Self>) -> Self {
        parts
            .reduce(|mut all, part| {
                all.taps.extend(part.taps);
                all
            })
            .unwrap_or_default()
    }

    /// Adds `rows` of a tap, from its row `from` on, to `out`.
    pub fn read(&self, tap: usize, from: usize, rows: usize, width: usize, out: &mut Vec<f32>) {
        let Some((format, bytes)) = self.taps.get(tap) else { return };
        let row_bytes = format.row_bytes(width);
        for row in bytes[from * row_bytes..(from + rows) * row_bytes].chunks_exact(row_bytes.max(1)) {
            let start = out.len();
            out.resize(start + width, 0.0);
            format.read(row, &mut out[start..]);
        }
    }
}

fn name(tap: usize) -> String {
    format!("tap.{tap}")
}

#[cfg(test)]
mod tests {
    use carryon_crds::pool::Dtype;

    use super::*;
    use crate::numbers::to_bytes;

    const FLOAT: RowFormat = RowFormat::Plain(Dtype::Float32);

    fn rows(first: usize, values: &[f32], width: usize) -> TapRows {
        TapRows { first, rows: values.len() / width, taps: vec![(FLOAT, to_bytes(values, Dtype::Float32))] }
    }

    #[test]
    fn rows_of_several_pools_travel_as_one_frame_of_the_positions_that_all_have() {
        let (mut one, mut other) = (rows(4, &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 2), rows(4, &[7.0, 8.0], 1));
        let joined = TapRows::join([one.split_to(2), other.split_to(2)].into_iter());
        assert_eq!((one.first, one.rows, other.rows), (6, 1, 0));
        let frame = Frame::parse(joined.encode(&[2, 1])).unwrap();
        let read = TapRows::decode(&frame, &[2, 1]).unwrap();
        assert_eq!(read, joined);
        let mut out = Vec::new();
        read.read(0, 1, 1, 2, &mut out);
        read.read(1, 0, 2, 1, &mut out);
        assert_eq!(out, [3.0, 4.0, 7.0, 8.0]);
        for widths in [&[2, 2][..], &[2, 1, 1]] {
            assert!(matches!(TapRows::decode(&frame, widths), Err(FrameError::Tensor { .. })), "{widths:?}");
        }
    }

    #[test]
    fn rows_of_a_pool_that_has_none_are_read_too() {
        let frame = Frame::parse(rows(9, &[], 3).encode(&[3])).unwrap();
        let read = TapRows::decode(&frame, &[3]).unwrap();
        assert_eq!((read.first, read.rows), (9, 0));
    }
}
