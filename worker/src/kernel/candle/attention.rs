//! Attention over pages: keys and values are gathered by their rows. Prompts go a tile of queries at a time, sequences that decode go together.

use candle_core::{D, Tensor};

use super::pages::{Pages, row_of};
use super::{Candle, CandleDevice, gemm, number_type};
use crate::kernel::{Attention, PAGE, Span};

/// Queries of a tile: bounds scores at tile · heads · positions.
const TILE: usize = 256;

/// See [`crate::kernel::Backend::attend`].
pub fn attend(
    backend: &CandleDevice,
    pages: &Pages,
    layer: usize,
    attention: Attention,
    rows: &Tensor,
    spans: &[Span<'_>],
) -> Candle<Tensor> {
    let width = attention.heads * pages.layout().head_dim;
    // Rounded once, after they are scaled, as the keys are.
    let queries = (rows.narrow(1, 0, width)? * f64::from(attention.scale))?.to_dtype(number_type(pages.layout().dtype))?;
    let mut parts = Vec::new();
    let mut first = 0;
    for spans in spans.chunk_by(|one, next| one.rows == 1 && next.rows == 1) {
        let count = spans.iter().map(|span| span.rows).sum();
        let queries = queries.narrow(0, first, count)?;
        parts.push(match spans {
            [span] => prompt(backend, pages, layer, attention, &queries, span)?,
            _ => decode(backend, pages, layer, attention, &queries, spans)?,
        });
        first += count;
    }
    Tensor::cat(&parts, 0)
}

/// The first position that a query at `position` sees.
fn first_seen(attention: Attention, position: usize) -> usize {
    attention.window.map_or(0, |window| (position + 1).saturating_sub(window))
}

/// One sequence's rows, [`TILE`] at a time.
fn prompt(backend: &CandleDevice, pages: &Pages, layer: usize, attention: Attention, queries: &Tensor, span: &Span<'_>) -> Candle<Tensor> {
    let mut parts = Vec::new();
    for first in (0..span.rows).step_by(TILE) {
        let count = TILE.min(span.rows - first);
        let start = span.length - span.rows + first;
        let (begin, end) = (first_seen(attention, start), start + count);
        let keys: Vec<u32> = (begin..end).map(|position| row_of(span, position)).collect();
        let [keys, values] = pages.gather(layer, &backend.indices(&keys)?)?;
        let sees = |query: usize| {
            let seen = first_seen(attention, start + query)..start + query + 1;
            (begin..end).map(move |key| if seen.contains(&key) { 0.0 } else { f32::NEG_INFINITY })
        };
        let mask = Tensor::from_vec((0..count).flat_map(sees).collect::<Vec<f32>>(), (1, 1, count, end - begin), &backend.device)?;
        let queries = queries.narrow(0, first, count)?.unsqueeze(0)?;
        parts.push(sdpa(pages, attention, &queries, &keys.unsqueeze(0)?, &values.unsqueeze(0)?, &mask)?.squeeze(0)?);
    }
    Tensor::cat(&parts, 0)
}

/// One row of each sequence, all together: shorter ones see nothing in the places that longer ones have more.
fn decode(
    backend: &CandleDevice,
    pages: &Pages,
    layer: usize,
    attention: Attention,
    queries: &Tensor,
    spans: &[Span<'_>],
) -> Candle<Tensor> {
    let begin = |span: &Span<'_>| first_seen(attention, span.length - 1) / PAGE * PAGE;
    let longest = spans.iter().map(|span| span.length - begin(span)).max().unwrap_or(1);
    let (mut rows, mut mask) = (Vec::with_capacity(spans.len() * longest), Vec::with_capacity(spans.len() * longest));
    for span in spans {
        let first = first_seen(attention, span.length - 1);
        for position in begin(span)..begin(span) + longest {
            let seen = (first..span.length).contains(&position);
            rows.push(row_of(span, position.min(span.length - 1)));
            mask.push(if seen { 0.0 } else { f32::NEG_INFINITY });
        }
    }
    let [keys, values] = pages.gather(layer, &backend.indices(&rows)?)?;
    let shape = (spans.len(), longest, pages.layout().heads, pages.layout().head_dim);
    let mask = Tensor::from_vec(mask, (spans.len(), 1, 1, longest), &backend.device)?;
    let attended = sdpa(pages, attention, &queries.unsqueeze(1)?, &keys.reshape(shape)?, &values.reshape(shape)?, &mask)?;
    attended.squeeze(1)
}

/// Attention of sequences × rows × (heads · head_dim) to sequences × positions × key/value heads × head_dim, with a mask that is added to the scores.
fn sdpa(pages: &Pages, attention: Attention, queries: &Tensor, keys: &Tensor, values: &Tensor, mask: &Tensor) -> Candle<Tensor> {
    let (sequences, rows, width) = queries.dims3()?;
    let (heads, head_dim) = (pages.layout().heads, pages.layout().head_dim);
    let group = attention.heads / heads;
    let positions = keys.dims()[1];
    // One batch for each sequence and key/value head; the queries of its group lie together.
    let batch = sequences * heads;
    let queries = queries.reshape((sequences, rows, heads, group, head_dim))?.permute((0, 2, 3, 1, 4))?;
    let queries = queries.contiguous()?.reshape((batch, group * rows, head_dim))?;
    let keys = keys.transpose(1, 2)?.contiguous()?.reshape((batch, positions, head_dim))?;
    let scores = gemm::multiply(&queries, &keys)?.reshape((sequences, attention.heads, rows, positions))?.broadcast_add(mask)?;
    let weights = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?)?.exp()?;
    let sums = weights.sum_keepdim(D::Minus1)?;
    let weights = weights.to_dtype(values.dtype())?.reshape((batch, group * rows, positions))?;
    let values = values.permute((0, 2, 3, 1))?.contiguous()?.reshape((batch, head_dim, positions))?;
    let context = gemm::multiply(&weights, &values)?.reshape((sequences, attention.heads, rows, head_dim))?.broadcast_div(&sums)?;
    context.transpose(1, 2)?.reshape((sequences, rows, width))?.to_dtype(number_type(pages.layout().dtype))
}
