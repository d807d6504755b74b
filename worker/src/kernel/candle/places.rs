//! Where the rows of a pass lie in the pages: the same in every layer, so it is put on the device once.

use candle_core::Tensor;

use super::pages::row_of;
use super::{Candle, CandleDevice};
use crate::kernel::{Attention, PAGE, Span, first_seen};

/// What [`super::attention`] and the pages need of a pass.
#[derive(Clone, Debug)]
pub struct Places {
    pub(super) attention: Attention,
    /// Rows of the pages that are written.
    pub(super) written: Tensor,
    /// How many of them, the last ones, are cleared.
    pub(super) cleared: usize,
    /// The rows of the pass, in order.
    pub(super) parts: Vec<Part>,
}

/// Rows of a pass that are computed together.
#[derive(Clone, Debug)]
pub(super) enum Part {
    /// Rows of one sequence, the last of the positions (k) that its first one and all behind it see.
    Prompt { rows: usize, keys: Tensor, positions: Tensor },
    /// One row of each of several sequences; the mask is added to its scores. Shorter ones see nothing in the places that longer ones have more.
    Decode { rows: usize, keys: Tensor, mask: Tensor },
}

impl Places {
    pub(super) fn new(backend: &CandleDevice, attention: Attention, spans: &[Span<'_>]) -> Candle<Self> {
        let (mut written, mut cleared) = (Vec::new(), Vec::new());
        for span in spans {
            let start = span.length - span.rows;
            written.extend((start..span.length).map(|position| row_of(span, position)));
            // What follows a span's last row in a page that it begins may hold what is no number.
            if span.length.next_multiple_of(PAGE) - PAGE >= start {
                cleared.extend((span.length..span.length.next_multiple_of(PAGE)).map(|position| row_of(span, position)));
            }
        }
        written.extend_from_slice(&cleared);
        let mut parts = Vec::new();
        for spans in spans.chunk_by(|one, next| one.rows == 1 && next.rows == 1) {
            parts.push(match spans {
                [span] => prompt(backend, attention, span)?,
                _ => decode(backend, attention, spans)?,
            });
        }
        Ok(Self { attention, written: backend.indices(&written)?, cleared: cleared.len(), parts })
    }
}

fn prompt(backend: &CandleDevice, attention: Attention, span: &Span<'_>) -> Candle<Part> {
    let seen = first_seen(attention.window, span.length - span.rows)..span.length;
    let keys: Vec<u32> = seen.clone().map(|position| row_of(span, position)).collect();
    let positions: Vec<f32> = seen.map(|position| position as f32).collect();
    Ok(Part::Prompt {
        rows: span.rows,
        keys: backend.indices(&keys)?,
        positions: Tensor::from_vec(positions, keys.len(), &backend.device)?,
    })
}

fn decode(backend: &CandleDevice, attention: Attention, spans: &[Span<'_>]) -> Candle<Part> {
    let begin = |span: &Span<'_>| first_seen(attention.window, span.length - 1) / PAGE * PAGE;
    let longest = spans.iter().map(|span| span.length - begin(span)).max().unwrap_or(1);
    let (mut keys, mut mask) = (Vec::with_capacity(spans.len() * longest), Vec::with_capacity(spans.len() * longest));
    for span in spans {
        let first = first_seen(attention.window, span.length - 1);
        for position in begin(span)..begin(span) + longest {
            let seen = (first..span.length).contains(&position);
            keys.push(row_of(span, position.min(span.length - 1)));
            mask.push(if seen { 0.0 } else { f32::NEG_INFINITY });
        }
    }
    let mask = Tensor::from_vec(mask, (spans.len(), 1, 1, longest), &backend.device)?;
    Ok(Part::Decode { rows: spans.len(), keys: backend.indices(&keys)?, mask })
}
