//! Safetensors files as frames: encoded without copying the tensors, decoded from a stream piece by piece.
//!
//! A safetensors file delimits itself (length of the header, header, data), so a stream is a plain concatenation of
//! files. Nothing is allocated before its length has been compared with a bound.

use std::collections::HashMap;

use bytes::Bytes;
use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};

use crate::tensor_file;

/// Bound of a frame's header.
pub const MAX_HEADER_BYTES: usize = 64 * 1024;

/// Why a frame cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The length of the header is absurd.
    #[error("header of {length} bytes exceeds the bound of {bound}")]
    HeaderTooLarge {
        /// What the frame says.
        length: u64,
        /// What is accepted.
        bound: usize,
    },
    /// The header is not safetensors'.
    #[error("header is not valid: {0}")]
    Header(#[source] serde_json::Error),
    /// The tensors are larger than the reader expects.
    #[error("data of {length} bytes exceed the bound of {bound}")]
    DataTooLarge {
        /// What the header says.
        length: usize,
        /// What is accepted.
        bound: usize,
    },
    /// The stream ended inside a frame.
    #[error("stream ended inside a frame: {received} of {expected} bytes")]
    Truncated {
        /// Bytes that came.
        received: usize,
        /// Bytes that were announced so far.
        expected: usize,
    },
    /// A tensor is missing or has another type or shape.
    #[error("tensor {name:?}: expected {expected}, found {found}")]
    Tensor {
        /// Its name.
        name: String,
        /// What the reader expects.
        expected: String,
        /// What the frame holds.
        found: String,
    },
    /// A member of the metadata is missing or wrong.
    #[error("metadata {name:?}: expected {expected}, found {found:?}")]
    Metadata {
        /// Its name.
        name: &'static str,
        /// What the reader expects.
        expected: String,
        /// What the frame holds.
        found: Option<String>,
    },
}

/// A tensor to be sent.
#[derive(Clone, Debug)]
pub struct Outgoing {
    /// Its name.
    pub name: String,
    /// Its number type.
    pub dtype: Dtype,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its numbers, little-endian, row-major.
    pub data: Bytes,
}

/// Encodes a safetensors file as pieces to be sent one after another: the header, then each tensor, uncopied.
pub fn encode(metadata: &[(&str, &str)], tensors: Vec<Outgoing>) -> Vec<Bytes> {
    let infos = tensors.iter().map(|tensor| (tensor.name.as_str(), tensor.dtype, tensor.shape.as_slice()));
    let mut pieces = vec![tensor_file::header(metadata, infos).into()];
    pieces.extend(tensors.into_iter().map(|tensor| tensor.data));
    pieces
}

/// A decoded safetensors file: header parsed and checked, tensors as slices of one buffer.
#[derive(Clone, Debug)]
pub struct Frame {
    header: Metadata,
    data: Bytes,
}

impl Frame {
    /// Decodes one whole file. The tensors share `bytes`.
    pub fn parse(mut bytes: Bytes) -> Result<Self, FrameError> {
        let received = bytes.len();
        if received < 8 {
            return Err(FrameError::Truncated { received, expected: 8 });
        }
        let length = header_length(&bytes.split_to(8))?;
        if bytes.len() < length {
            return Err(FrameError::Truncated { received, expected: 8 + length });
        }
        let header = parse_header(&bytes.split_to(length))?;
        if bytes.len() != header.data_len() {
            return Err(FrameError::Truncated { received, expected: 8 + length + header.data_len() });
        }
        Ok(Self { header, data: bytes })
    }

    /// Value of a metadata key.
    pub fn metadata(&self, name: &str) -> Option<&str> {
        self.header.metadata().as_ref()?.get(name).map(String::as_str)
    }

    /// A metadata value read as a number.
    pub fn metadata_number(&self, name: &'static str) -> Result<usize, FrameError> {
        let found = self.metadata(name);
        let error = || FrameError::Metadata { name, expected: "a number".to_owned(), found: found.map(str::to_owned) };
        found.and_then(|text| text.parse().ok()).ok_or_else(error)
    }

    /// Number type, shape and place of a tensor.
    pub fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.header.info(name)
    }

    /// All tensors by name.
    pub fn tensors(&self) -> HashMap<String, &TensorInfo> {
        self.header.tensors()
    }

    /// Numbers of a tensor that must have this type and shape.
    pub fn tensor(&self, name: &str, dtype: Dtype, shape: &[usize]) -> Result<Bytes, FrameError> {
        let info = self.header.info(name);
        match info {
            Some(info) if info.dtype == dtype && info.shape == shape => Ok(self.data.slice(info.data_offsets.0..info.data_offsets.1)),
            _ => Err(FrameError::Tensor {
                name: name.to_owned(),
                expected: format!("{dtype:?} {shape:?}"),
                found: info.map_or_else(|| "nothing".to_owned(), |info| format!("{:?} {:?}", info.dtype, info.shape)),
            }),
        }
    }
}

fn header_length(bytes: &[u8]) -> Result<usize, FrameError> {
    let mut length = [0; 8];
    length.copy_from_slice(bytes);
    let length = u64::from_le_bytes(length);
    match usize::try_from(length) {
        Ok(length) if length <= MAX_HEADER_BYTES => Ok(length),
        _ => Err(FrameError::HeaderTooLarge { length, bound: MAX_HEADER_BYTES }),
    }
}

fn parse_header(bytes: &[u8]) -> Result<Metadata, FrameError> {
    serde_json::from_slice(bytes).map_err(FrameError::Header)
}

/// Takes a concatenation of safetensors files apart as its bytes arrive.
#[derive(Debug)]
pub struct FrameReader {
    /// Bound of one frame's data.
    bound: usize,
    state: State,
    buffer: Vec<u8>,
}

#[derive(Debug)]
enum State {
    /// Eight bytes are awaited.
    Length,
    /// So many bytes of header are awaited.
    Header(usize),
    /// So many bytes of data are awaited.
    Data(Metadata, usize),
}

impl FrameReader {
    /// A reader that refuses frames with more than `bound` bytes of data.
    pub fn new(bound: usize) -> Self {
        Self { bound, state: State::Length, buffer: Vec::new() }
    }

    /// Takes bytes from `input` until a frame is complete or nothing is left.
    pub fn feed(&mut self, input: &mut Bytes) -> Result<Option<Frame>, FrameError> {
        loop {
            let missing = self.expected() - self.buffer.len();
            let taken = input.split_to(missing.min(input.len()));
            self.buffer.extend_from_slice(&taken);
            if taken.len() < missing {
                return Ok(None);
            }
            let bytes = std::mem::take(&mut self.buffer);
            match std::mem::replace(&mut self.state, State::Length) {
                State::Length => self.state = State::Header(header_length(&bytes)?),
                State::Header(_) => {
                    let header = parse_header(&bytes)?;
                    let length = header.data_len();
                    if length > self.bound {
                        return Err(FrameError::DataTooLarge { length, bound: self.bound });
                    }
                    self.buffer = Vec::with_capacity(length);
                    self.state = State::Data(header, length);
                }
                State::Data(header, _) => return Ok(Some(Frame { header, data: bytes.into() })),
            }
        }
    }

    /// Checks that the stream ended between two frames.
    pub fn finish(&self) -> Result<(), FrameError> {
        match (&self.state, self.buffer.len()) {
            (State::Length, 0) => Ok(()),
            (_, received) => Err(FrameError::Truncated { received, expected: self.expected() }),
        }
    }

    fn expected(&self) -> usize {
        match self.state {
            State::Length => 8,
            State::Header(length) | State::Data(_, length) => length,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(index: usize, data: &[u8]) -> Vec<u8> {
        let tensor =
            Outgoing { name: "final".to_owned(), dtype: Dtype::U8, shape: vec![1, data.len()], data: Bytes::copy_from_slice(data) };
        encode(&[("index", &index.to_string())], vec![tensor]).concat()
    }

    fn decode(stream: &[u8], piece: usize, bound: usize) -> Result<Vec<Frame>, FrameError> {
        let mut reader = FrameReader::new(bound);
        let mut frames = Vec::new();
        for part in stream.chunks(piece) {
            let mut part = Bytes::copy_from_slice(part);
            while let Some(frame) = reader.feed(&mut part)? {
                frames.push(frame);
            }
        }
        reader.finish().map(|()| frames)
    }

    #[test]
    fn a_stream_decodes_the_same_however_it_is_cut() {
        let stream = [sample(0, b"abcd"), sample(1, b""), sample(2, b"xyz")].concat();
        for piece in [1, 3, 7, 64, stream.len()] {
            let frames = decode(&stream, piece, 4).unwrap();
            let texts: Vec<_> = frames.iter().map(|frame| frame.tensors()["final"].shape[1]).collect();
            assert_eq!(texts, [4, 0, 3]);
            assert_eq!(&frames[2].tensor("final", Dtype::U8, &[1, 3]).unwrap()[..], b"xyz");
            assert_eq!(frames[2].metadata_number("index").unwrap(), 2);
        }
    }

    #[test]
    fn frames_are_what_the_safetensors_crate_reads() {
        let file = sample(7, b"abcd");
        let tensors = safetensors::SafeTensors::deserialize(&file).unwrap();
        assert_eq!(tensors.tensor("final").unwrap().data(), b"abcd");
        assert_eq!(Frame::parse(file.into()).unwrap().metadata("index"), Some("7"));
    }

    #[test]
    fn refuses_an_absurd_header_length_before_allocating() {
        let error = decode(&u64::MAX.to_le_bytes(), 8, 4).unwrap_err();
        assert!(matches!(error, FrameError::HeaderTooLarge { length: u64::MAX, .. }), "{error}");
    }

    #[test]
    fn refuses_data_beyond_the_bound() {
        let error = decode(&sample(0, b"abcde"), 5, 4).unwrap_err();
        assert!(matches!(error, FrameError::DataTooLarge { length: 5, bound: 4 }), "{error}");
    }

    #[test]
    fn refuses_a_truncated_stream() {
        let stream = sample(0, b"abcd");
        for length in [1, 8, 20, stream.len() - 1] {
            let error = decode(&stream[..length], 16, 4).unwrap_err();
            assert!(matches!(error, FrameError::Truncated { .. }), "{length}: {error}");
            assert!(Frame::parse(Bytes::copy_from_slice(&stream[..length])).is_err());
        }
    }

    #[test]
    fn refuses_corrupt_headers() {
        let good = sample(0, b"abcd");
        for (from, to) in [("\"U8\"", "\"U9\""), ("[1,4]", "[1,5]"), ("[0,4]", "[9,4]"), ("{", "[")] {
            let text = String::from_utf8_lossy(&good).replacen(from, to, 1).into_bytes();
            assert!(matches!(decode(&text, 9, 64), Err(FrameError::Header(_))), "{from} -> {to}");
        }
    }

    #[test]
    fn a_tensor_of_another_shape_is_named() {
        let frame = Frame::parse(sample(0, b"abcd").into()).unwrap();
        let error = frame.tensor("final", Dtype::BF16, &[2, 1]).unwrap_err();
        assert_eq!(error.to_string(), "tensor \"final\": expected BF16 [2, 1], found U8 [1, 4]");
        assert!(frame.tensor("layer.1", Dtype::U8, &[1, 4]).unwrap_err().to_string().ends_with("found nothing"));
    }
}
