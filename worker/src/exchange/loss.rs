//! The remote loss: states and head outputs there, losses and gradients back.

use bytes::Bytes;
use carryon_crds::pool::Dtype;

use super::frames::{self, Frame, FrameError, Outgoing};
use crate::numbers::{from_bytes, number_bytes, to_bytes, wire_dtype};

/// Asks for the loss of N rows: y = x̂ + delta through the base's LM head, against targets or against the base.
#[derive(Clone, Debug, PartialEq)]
pub struct LossRequest {
    /// Width D of a row.
    pub hidden_size: usize,
    /// Number type of `x`.
    pub dtype: Dtype,
    /// x̂: N × D, little-endian, as the pool sent them.
    pub x: Bytes,
    /// α·g⊙Δ: N × D numbers in f32, little-endian; the base's own loss when absent.
    pub delta: Option<Bytes>,
    /// Target token of each row; when absent the rows are measured against the base: `Σ p₀ (ln p₀ - ln p)` over the vocabulary, p₀ being x̂'s
    /// probabilities and p those of y.
    pub targets: Option<Vec<u32>>,
    /// Whether the gradient is wanted too.
    pub gradient: bool,
}

impl LossRequest {
    /// Number N of rows.
    pub fn rows(&self) -> usize {
        self.x.len() / (self.hidden_size * number_bytes(self.dtype)).max(1)
    }

    /// The request as pieces of a safetensors file.
    pub fn encode(&self) -> Vec<Bytes> {
        let shape = vec![self.rows(), self.hidden_size];
        let tensor = |name: &str, dtype, shape: &[usize], data| Outgoing { name: name.to_owned(), dtype, shape: shape.to_vec(), data };
        let mut tensors = vec![tensor("x", wire_dtype(self.dtype), &shape, self.x.clone())];
        if let Some(delta) = &self.delta {
            tensors.push(tensor("delta", safetensors::Dtype::F32, &shape, delta.clone()));
        }
        if let Some(targets) = &self.targets {
            let targets: Vec<u8> = targets.iter().flat_map(|target| target.to_le_bytes()).collect();
            tensors.push(tensor("targets", safetensors::Dtype::U32, &shape[..1], targets.into()));
        }
        frames::encode(&[("gradient", &self.gradient.to_string())], tensors)
    }

    /// Reads what [`Self::encode`] wrote, for a base of width `hidden_size`.
    pub fn decode(bytes: Bytes, hidden_size: usize) -> Result<Self, FrameError> {
        let frame = Frame::parse(bytes)?;
        let rows = frame.info("x").map_or(0, |info| info.shape.first().copied().unwrap_or(0));
        let targets = match frame.info("targets") {
            Some(_) => Some(frame.tensor("targets", safetensors::Dtype::U32, &[rows])?),
            None => None,
        };
        let dtype = match frame.info("x").map(|info| info.dtype) {
            Some(safetensors::Dtype::BF16) => Dtype::Bfloat16,
            _ => Dtype::Float32,
        };
        let x = frame.tensor("x", wire_dtype(dtype), &[rows, hidden_size])?;
        let delta = match frame.info("delta") {
            Some(_) => Some(frame.tensor("delta", safetensors::Dtype::F32, &[rows, hidden_size])?),
            None => None,
        };
        let words = |bytes: Bytes| bytes.as_chunks::<4>().0.iter().map(|bytes| u32::from_le_bytes(*bytes)).collect();
        let targets = targets.map(words);
        Ok(Self { hidden_size, dtype, x, delta, targets, gradient: frame.metadata("gradient") == Some("true") })
    }
}

/// Losses and gradients of the rows of a [`LossRequest`].
#[derive(Clone, Debug, PartialEq)]
pub struct LossResponse {
    /// Nats of each row.
    pub loss: Vec<f32>,
    /// ∂loss/∂y of each row, N × D, unnormalised; absent when it was not asked for.
    pub gradient: Option<Vec<f32>>,
}

impl LossResponse {
    /// The answer as pieces of a safetensors file.
    pub fn encode(&self, hidden_size: usize) -> Vec<Bytes> {
        let rows = self.loss.len();
        let tensor = |name: &str, shape, values| {
            let data = to_bytes(values, Dtype::Float32);
            Outgoing { name: name.to_owned(), dtype: safetensors::Dtype::F32, shape, data }
        };
        let mut tensors = vec![tensor("loss", vec![rows], &self.loss)];
        if let Some(gradient) = &self.gradient {
            tensors.push(tensor("gradient", vec![rows, hidden_size], gradient));
        }
        frames::encode(&[], tensors)
    }

    /// Reads what [`Self::encode`] wrote in answer to `request`.
    pub fn decode(bytes: Bytes, request: &LossRequest) -> Result<Self, FrameError> {
        let frame = Frame::parse(bytes)?;
        let rows = request.rows();
        let loss = numbers(&frame.tensor("loss", safetensors::Dtype::F32, &[rows])?);
        let gradient = match request.gradient {
            true => Some(numbers(&frame.tensor("gradient", safetensors::Dtype::F32, &[rows, request.hidden_size])?)),
            false => None,
        };
        Ok(Self { loss, gradient })
    }
}

fn numbers(bytes: &[u8]) -> Vec<f32> {
    let mut values = vec![0.0; bytes.len() / 4];
    from_bytes(bytes, Dtype::Float32, &mut values);
    values
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::numbers::into_bytes;

    fn request() -> LossRequest {
        LossRequest {
            hidden_size: 2,
            dtype: Dtype::Bfloat16,
            x: to_bytes(&[1.0, 2.0, 3.0, 4.0], Dtype::Bfloat16),
            delta: Some(into_bytes(vec![0.1, 0.2, 0.3, 0.4])),
            targets: Some(vec![7, 8]),
            gradient: true,
        }
    }

    #[test]
    fn requests_and_answers_survive_the_wire() {
        let base = LossRequest { delta: None, gradient: false, ..request() };
        for request in [request(), base, LossRequest { targets: None, ..request() }] {
            assert_eq!(LossRequest::decode(request.encode().concat().into(), 2).unwrap(), request);
            let response = LossResponse { loss: vec![0.5, 1.5], gradient: request.gradient.then(|| vec![1.0, 2.0, 3.0, 4.0]) };
            assert_eq!(LossResponse::decode(response.encode(2).concat().into(), &request).unwrap(), response);
        }
    }

    #[test]
    fn another_width_is_refused_by_name() {
        let error = LossRequest::decode(request().encode().concat().into(), 3).unwrap_err();
        assert_eq!(error.to_string(), "tensor \"x\": expected BF16 [2, 3], found BF16 [2, 2]");
    }

    #[test]
    fn an_answer_without_the_gradient_asked_for_is_refused() {
        let bytes = LossResponse { loss: vec![0.5, 1.5], gradient: None }.encode(2).concat();
        assert!(LossResponse::decode(bytes.into(), &request()).unwrap_err().to_string().contains("gradient"));
    }
}
