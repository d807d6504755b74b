//! What the decoder keeps between calls of [`Backend`](crate::kernel::Backend): rows, packed rows, and where they lie.

use crate::kernel::{Attention, Span};

/// Rows of f32.
#[derive(Clone, Debug, Default)]
pub struct Rows {
    pub(super) values: Vec<f32>,
    pub(super) width: usize,
}

/// Rows of packed words.
#[derive(Clone, Debug, Default)]
pub struct PackedRows {
    pub(super) words: Vec<u32>,
    /// Words of a row.
    pub(super) stride: usize,
}

/// The spans of a pass.
#[derive(Clone, Debug)]
pub struct Places {
    pub(super) attention: Attention,
    spans: Vec<(usize, usize, Vec<u32>)>,
}

impl Places {
    pub(super) fn new(attention: Attention, spans: &[Span<'_>]) -> Self {
        let own = |span: &Span<'_>| (span.rows, span.length, span.pages.to_vec());
        Self { attention, spans: spans.iter().map(own).collect() }
    }

    pub(super) fn spans(&self) -> Vec<Span<'_>> {
        self.spans.iter().map(|(rows, length, pages)| Span { rows: *rows, length: *length, pages }).collect()
    }
}

impl Rows {
    /// Takes the shape rows × width; what it holds then is of no meaning.
    pub(super) fn shape(&mut self, rows: usize, width: usize) -> &mut [f32] {
        self.values.resize(rows * width, 0.0);
        self.width = width;
        &mut self.values
    }

    pub(super) fn count(&self) -> usize {
        self.values.len().checked_div(self.width).unwrap_or(0)
    }

    pub(super) fn row(&self, row: usize) -> &[f32] {
        &self.values[row * self.width..][..self.width]
    }
}

impl PackedRows {
    pub(super) fn shape(&mut self, rows: usize, stride: usize) -> &mut [u32] {
        self.words.resize(rows * stride, 0);
        self.stride = stride;
        &mut self.words
    }
}
