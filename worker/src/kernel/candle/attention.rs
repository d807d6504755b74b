//! Attention over pages: keys and values are gathered by their rows. Prompts go a tile of queries at a time, sequences that decode go together.

use candle_core::{DType, Tensor};
use candle_nn::ops::softmax_last_dim;

use super::pages::Pages;
use super::places::{Part, Places};
use super::{Candle, capped, gemm, joined, number_type};
use crate::kernel::{Attention, first_seen};

/// Queries of a tile: bounds scores at tile · heads · positions.
const TILE: usize = 256;
/// Added to the scores of what a query does not see: its weight becomes 0.
const UNSEEN: f64 = 1e30;

/// See [`crate::kernel::Backend::attend`].
pub fn attend(pages: &Pages, layer: usize, rows: &Tensor, places: &Places) -> Candle<Tensor> {
    let attention = places.attention;
    let width = attention.heads * pages.layout().head_dim;
    // Rounded once, after they are scaled, as the keys are.
    let queries = (rows.narrow(1, 0, width)? * f64::from(attention.scale))?.to_dtype(number_type(pages.layout().dtype))?;
    let (mut parts, mut first) = (Vec::with_capacity(places.parts.len()), 0);
    for part in &places.parts {
        let (Part::Prompt { rows, keys, .. } | Part::Decode { rows, keys, .. }) = part;
        let queries = queries.narrow(0, first, *rows)?;
        let read = pages.gather(layer, keys)?;
        match part {
            Part::Prompt { positions, .. } => prompt(pages, attention, &queries, &read, positions, &mut parts)?,
            Part::Decode { mask, .. } => parts.push(decode(pages, attention, &queries, &read, mask)?),
        }
        first += rows;
    }
    joined(parts)
}

/// The rows of one sequence, [`TILE`] at a time, to keys and values of positions whose last are theirs.
fn prompt(
    pages: &Pages,
    attention: Attention,
    queries: &Tensor,
    read: &[Tensor; 2],
    positions: &Tensor,
    parts: &mut Vec<Tensor>,
) -> Candle<()> {
    let (rows, known) = (queries.dims()[0], positions.dims()[0]);
    for first in (0..rows).step_by(TILE) {
        let count = TILE.min(rows - first);
        let (start, end) = (known - rows + first, known - rows + first + count);
        let begin = first_seen(attention.window, start);
        let [keys, values] = [0, 1].map(|part| read[part].narrow(0, begin, end - begin)?.transpose(0, 1));
        let mask = mask(attention, &positions.narrow(0, begin, end - begin)?, &positions.narrow(0, start, count)?)?;
        let queries = queries.narrow(0, first, count)?.unsqueeze(0)?;
        parts.push(sdpa(pages, attention, &queries, &keys?.contiguous()?, &values?.contiguous()?, &mask)?.squeeze(0)?);
    }
    Ok(())
}

/// What is added to the scores, 1 × 1 × queries × keys. It is as large as a head's scores, so it is made again for each layer.
pub fn mask(attention: Attention, keys: &Tensor, queries: &Tensor) -> Candle<Tensor> {
    let (keys, queries) = (keys.unsqueeze(0)?, queries.unsqueeze(1)?);
    let mut seen = keys.broadcast_le(&queries)?.to_dtype(DType::F32)?;
    if let Some(window) = attention.window {
        seen = (seen * keys.broadcast_gt(&(queries - window as f64)?)?.to_dtype(DType::F32)?)?;
    }
    seen.affine(UNSEEN, -UNSEEN)?.unsqueeze(0)?.unsqueeze(0)
}

/// One row of each sequence, all together, to as many positions of each.
fn decode(pages: &Pages, attention: Attention, queries: &Tensor, read: &[Tensor; 2], mask: &Tensor) -> Candle<Tensor> {
    let heads = pages.layout().heads;
    let (sequences, _, _, longest) = mask.dims4()?;
    let apart = |rows: &Tensor| {
        let head_dim = rows.dims()[2];
        let rows = rows.reshape((sequences, longest, heads, head_dim))?.transpose(1, 2)?;
        rows.contiguous()?.reshape((sequences * heads, longest, head_dim))
    };
    sdpa(pages, attention, &queries.unsqueeze(1)?, &apart(&read[0])?, &apart(&read[1])?, mask)?.squeeze(1)
}

/// Attention of sequences × rows × (heads · head_dim) to (sequences · key/value heads) × positions × head_dim or value_dim, with what is added to the scores.
fn sdpa(pages: &Pages, attention: Attention, queries: &Tensor, keys: &Tensor, values: &Tensor, mask: &Tensor) -> Candle<Tensor> {
    let (sequences, rows, _) = queries.dims3()?;
    let (batch, positions, head_dim) = keys.dims3()?;
    let (heads, group) = (pages.layout().heads, attention.heads / pages.layout().heads);
    // One batch for each sequence and key/value head; the queries of its group lie together.
    let queries = queries.reshape((sequences, rows, heads, group, head_dim))?.permute((0, 2, 3, 1, 4))?;
    let queries = queries.contiguous()?.reshape((batch, group * rows, head_dim))?;
    let mut scores = gemm::multiply(&queries, keys)?.reshape((sequences, attention.heads, rows, positions))?;
    if let Some(cap) = attention.softcap {
        scores = capped(&scores, cap)?;
    }
    let weights = softmax_last_dim(&scores.broadcast_add(mask)?)?.to_dtype(values.dtype())?.reshape((batch, group * rows, positions))?;
    let context = gemm::multiply(&weights, &values.t()?)?.to_dtype(number_type(pages.layout().dtype))?;
    let value_dim = pages.layout().value_dim();
    context.reshape((sequences, attention.heads, rows, value_dim))?.transpose(1, 2)?.reshape((sequences, rows, attention.heads * value_dim))
}
