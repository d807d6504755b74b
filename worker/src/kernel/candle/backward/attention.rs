//! Causal attention with rotary positions over the sequences of a packed batch, there and back: all heads of some queries at a time.

use std::ops::Range;

use candle_core::{D, DType, Tensor};
use candle_nn::ops::softmax_last_dim;
use candle_nn::rotary_emb::rope_thd;

use super::super::attention::mask;
use super::super::{Candle, indices};
use crate::kernel::{Attention, first_seen};

/// Queries whose scores exist at the same time: nothing grows with the square of a sequence's length.
const TILE: usize = 256;

/// Whole sequences that attend to themselves.
pub struct Whole<'a> {
    attention: Attention,
    lengths: &'a [usize],
    /// Of every row of the batch, rows × d/2.
    cosines: Tensor,
    sines: Tensor,
    /// 0 to the end of the longest sequence.
    positions: Tensor,
}

/// Queries of a sequence, and the keys that they see.
struct Part {
    queries: Range<usize>,
    keys: Range<usize>,
    mask: Tensor,
}

impl<'a> Whole<'a> {
    /// `angles`: all cosines, then all sines of positions.
    pub fn new(attention: Attention, angles: &Tensor, lengths: &'a [usize]) -> Candle<Self> {
        let known = angles.dims()[0] / 2;
        let positions: Vec<u32> = lengths.iter().flat_map(|length| 0..*length as u32).collect();
        let at = indices(&positions, angles.device())?;
        let [cosines, sines] = [0, known].map(|first| angles.narrow(0, first, known)?.index_select(&at, 0));
        let positions = Tensor::arange(0, known as i64, angles.device())?.to_dtype(DType::F32)?;
        Ok(Self { attention, lengths, cosines: cosines?, sines: sines?, positions })
    }

    /// Of rows `[q | k | v]`, rows × 3w, the queries and keys are rotated in place; gives rows × w.
    pub fn forward(&self, qkv: &Tensor) -> Candle<Tensor> {
        let width = qkv.dims()[1] / 3;
        qkv.slice_set(&self.rotated(&qkv.narrow(1, 0, 2 * width)?, &self.sines)?, 1, 0)?;
        let mut outputs = Vec::new();
        for rows in self.sequences() {
            let [q, k, v] = self.heads(&qkv.narrow(0, rows.start, rows.len())?)?;
            for part in self.parts(rows.len())? {
                let weights = self.weights(&part, &q, &k)?;
                outputs.push(joined_heads(&weights.matmul(&some(&v, &part.keys)?)?)?);
            }
        }
        Tensor::cat(&outputs, 0)
    }

    /// From rotated rows and the gradient by the result to that by unrotated rows. With `s = scale · q · k`, `p = softmax(s)`, `y = p · v`:
    /// `dv = pᵀ · dy`, `dp = dy · vᵀ`, `ds = p (dp - Σ p dp)`, `dq = scale · ds · k`, `dk = scale · dsᵀ · q`.
    pub fn backward(&self, qkv: &Tensor, dy: &Tensor) -> Candle<Tensor> {
        let scale = f64::from(self.attention.scale);
        let mut gradients = Vec::new();
        for rows in self.sequences() {
            let [q, k, v] = self.heads(&qkv.narrow(0, rows.start, rows.len())?)?;
            let [dy] = self.heads(&dy.narrow(0, rows.start, rows.len())?)?;
            let (dk, dv, mut dq) = (k.zeros_like()?, v.zeros_like()?, Vec::new());
            for part in self.parts(rows.len())? {
                let p = self.weights(&part, &q, &k)?;
                let (q, dy) = (some(&q, &part.queries)?, some(&dy, &part.queries)?);
                let (k, v) = (some(&k, &part.keys)?, some(&v, &part.keys)?);
                add_to(&dv, &part.keys, &p.t()?.matmul(&dy)?)?;
                let dp = dy.matmul(&v.t()?)?;
                let mean = (&p * &dp)?.sum_keepdim(D::Minus1)?;
                let ds = ((p * dp.broadcast_sub(&mean)?)? * scale)?;
                add_to(&dk, &part.keys, &ds.t()?.matmul(&q)?)?;
                dq.push(ds.matmul(&k)?);
            }
            let parts = [Tensor::cat(&dq, 1)?, dk, dv].iter().map(joined_heads).collect::<Candle<Vec<_>>>()?;
            gradients.push(Tensor::cat(&parts, 1)?);
        }
        let gradient = Tensor::cat(&gradients, 0)?;
        let width = gradient.dims()[1] / 3;
        gradient.slice_set(&self.rotated(&gradient.narrow(1, 0, 2 * width)?, &self.sines.neg()?)?, 1, 0)?;
        Ok(gradient)
    }

    /// Rows of each sequence.
    fn sequences(&self) -> impl Iterator<Item = Range<usize>> + use<'_> {
        self.lengths.iter().scan(0, |first, length| {
            *first += length;
            Some(*first - length..*first)
        })
    }

    /// Queries and keys, rows × 2w, turned by their positions.
    fn rotated(&self, rows: &Tensor, sines: &Tensor) -> Candle<Tensor> {
        let (count, width) = rows.dims2()?;
        let head_dim = 2 * self.cosines.dims()[1];
        let heads = rows.reshape((1, count, width / head_dim, head_dim))?.contiguous()?;
        rope_thd(&heads, &self.cosines, sines)?.reshape((count, width))
    }

    /// Rows × (n · w) as n times heads × rows × d.
    fn heads<const N: usize>(&self, rows: &Tensor) -> Candle<[Tensor; N]> {
        let (count, width) = rows.dims2()?;
        let heads = self.attention.heads;
        let apart = rows.reshape((count, N, heads, width / N / heads))?.permute((1, 2, 0, 3))?.contiguous()?;
        let mut parts = Vec::with_capacity(N);
        for part in 0..N {
            parts.push(apart.get(part)?);
        }
        parts.try_into().map_err(|_| candle_core::Error::Msg("as many parts as asked for".to_owned()))
    }

    /// The queries of a sequence, [`TILE`] at a time.
    fn parts(&self, length: usize) -> Candle<Vec<Part>> {
        let part = |first: usize| {
            let queries = first..(first + TILE).min(length);
            let keys = first_seen(self.attention.window, first)..queries.end;
            let at = |range: &Range<usize>| self.positions.narrow(0, range.start, range.len());
            let mask = mask(self.attention, &at(&keys)?, &at(&queries)?)?.squeeze(0)?;
            Ok(Part { queries, keys, mask })
        };
        (0..length).step_by(TILE).map(part).collect()
    }

    /// Probabilities of a part, heads × queries × keys.
    fn weights(&self, part: &Part, q: &Tensor, k: &Tensor) -> Candle<Tensor> {
        let scores = (some(q, &part.queries)?.matmul(&some(k, &part.keys)?.t()?)? * f64::from(self.attention.scale))?;
        softmax_last_dim(&scores.broadcast_add(&part.mask)?)
    }
}

/// Some rows of every head.
fn some(heads: &Tensor, rows: &Range<usize>) -> Candle<Tensor> {
    heads.narrow(1, rows.start, rows.len())?.contiguous()
}

/// Adds to some rows of every head, in place.
fn add_to(target: &Tensor, rows: &Range<usize>, addend: &Tensor) -> Candle<()> {
    target.slice_set(&(target.narrow(1, rows.start, rows.len())? + addend)?, 1, rows.start)
}

/// Heads × rows × d as rows × (heads · d).
fn joined_heads(heads: &Tensor) -> Candle<Tensor> {
    let (count, rows, head_dim) = heads.dims3()?;
    heads.transpose(0, 1)?.contiguous()?.reshape((rows, count * head_dim))
}
