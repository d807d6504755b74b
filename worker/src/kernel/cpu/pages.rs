//! Keys and values in pages, packed for the tile kernel.
//!
//! A page holds 32 positions in all layers: for each layer and key/value head one panel of keys (32 positions as columns, head values as steps)
//! and panels of values (head values as columns, positions as steps). Where values are part of the keys they are kept once, as keys, and whoever
//! sums them up turns a panel at a time. Absent positions are zero.

use carryon_crds::pool::Dtype;

use super::isa::vectorised;
use super::operand::{bf16_bits, words};
use super::threads::{Disjoint, Threads};
use super::tile::COLUMNS;
use crate::kernel::{PAGE, PageLayout, Span};

const _: () = assert!(PAGE == COLUMNS, "a page is one panel of keys");

/// An arena of pages; those that are not in use take no memory.
pub struct Pages {
    layout: PageLayout,
    pages: Vec<Box<[u32]>>,
}

/// Words of a page.
pub(in crate::kernel) fn page_words(layout: &PageLayout) -> usize {
    layout.layers * layer_words(layout)
}

fn layer_words(layout: &PageLayout) -> usize {
    layout.heads * head_words(layout)
}

fn head_words(layout: &PageLayout) -> usize {
    let value_panels = if layout.latent.is_some() { 0 } else { layout.head_dim.div_ceil(COLUMNS) };
    key_words(layout) + value_panels * value_panel_words(layout)
}

fn key_words(layout: &PageLayout) -> usize {
    words(layout.dtype, layout.head_dim) * COLUMNS
}

/// Words of one head's panel of values: 32 positions by 32 values.
fn value_panel_words(layout: &PageLayout) -> usize {
    words(layout.dtype, PAGE) * COLUMNS
}

impl Pages {
    /// Room for `count` pages, none of which is in use.
    pub fn new(layout: PageLayout, count: usize) -> Self {
        let PageLayout { heads, head_dim, .. } = layout;
        assert!(heads > 0 && head_dim > 0 && head_dim.is_multiple_of(2), "no pages of {heads} heads of {head_dim} values");
        assert!(layout.latent.is_none_or(|value| value.is_multiple_of(2) && value <= head_dim), "no value in a key of {head_dim} values");
        Self { layout, pages: std::iter::repeat_with(Box::default).take(count).collect() }
    }

    /// What a page holds.
    pub fn layout(&self) -> &PageLayout {
        &self.layout
    }

    /// Makes a page ready: all zeros.
    pub fn take(&mut self, page: u32) {
        self.pages[page as usize] = vec![0; page_words(&self.layout)].into_boxed_slice();
    }

    /// Copies a page.
    pub fn copy(&mut self, from: u32, to: u32) {
        let copy = self.pages[from as usize].clone();
        self.pages[to as usize] = copy;
    }

    /// Gives a page's memory back.
    pub fn give(&mut self, page: u32) {
        self.pages[page as usize] = Box::default();
    }

    /// Writes keys and values of the spans' rows, which are `stride` floats apart, in `layer`; a row holds its keys from `column` on, then its values,
    /// if they are not part of the keys.
    pub fn append(&mut self, threads: &Threads, layer: usize, rows: &[f32], stride: usize, column: usize, spans: &[Span<'_>]) {
        let layout = self.layout;
        let mut tasks = Vec::new();
        let mut first_row = 0;
        for span in spans {
            let start = span.length - span.rows;
            for block in start / PAGE..span.length.div_ceil(PAGE) {
                let positions = (block * PAGE).max(start)..((block + 1) * PAGE).min(span.length);
                tasks.push((span.pages[block], first_row + positions.start - start, positions));
            }
            first_row += span.rows;
        }
        let mut written: Vec<u32> = tasks.iter().map(|(page, ..)| *page).collect();
        written.sort_unstable();
        assert!(written.is_sorted_by(|one, next| one < next), "a page is written by two sequences");
        let pages = Disjoint::new(&mut self.pages);
        threads.run_blocks(tasks.len(), |index| {
            let (page, row, positions) = &tasks[index];
            // SAFETY: no page is there twice: checked above.
            let page = unsafe { &mut pages.slice(*page as usize, 1)[0] };
            let layer = &mut page[layer * layer_words(&layout)..][..layer_words(&layout)];
            write(layer, &layout, positions.start % PAGE, &rows[row * stride..], stride, column, positions.len());
        });
    }

    fn head(&self, page: u32, layer: usize, head: usize) -> &[u32] {
        let start = layer * layer_words(&self.layout) + head * head_words(&self.layout);
        &self.pages[page as usize][start..][..head_words(&self.layout)]
    }

    /// The panel of keys of one head in a page.
    pub(super) fn keys(&self, page: u32, layer: usize, head: usize) -> &[u32] {
        &self.head(page, layer, head)[..key_words(&self.layout)]
    }

    /// The panel `panel` of its values; `turned` is room for one that has to be made.
    pub(super) fn values<'a>(&'a self, page: u32, layer: usize, head: usize, panel: usize, turned: &'a mut Vec<u32>) -> &'a [u32] {
        let length = value_panel_words(&self.layout);
        let Some(value_dim) = self.layout.latent else {
            return &self.head(page, layer, head)[key_words(&self.layout) + panel * length..][..length];
        };
        turned.resize(length, 0);
        let first = self.layout.head_dim - value_dim + panel * COLUMNS;
        let columns = COLUMNS.min(self.layout.head_dim - first);
        let keys =
            &self.keys(page, layer, head)[words(self.layout.dtype, first) * COLUMNS..][..words(self.layout.dtype, columns) * COLUMNS];
        match self.layout.dtype {
            Dtype::Float32 => turn_f32(keys, turned),
            Dtype::Bfloat16 => turn_bf16(keys, turned),
        }
        turned
    }
}

vectorised! {
    /// Writes `count` rows as positions `first..` of one layer's page.
    fn write(page: &mut [u32], layout: &PageLayout, first: usize, rows: &[f32], stride: usize, column: usize, count: usize) {
        for position in 0..count {
            let (keys, values) = rows[position * stride + column..][..layout.width()].split_at(layout.heads * layout.head_dim);
            for (index, (head, keys)) in page.chunks_exact_mut(head_words(layout)).zip(keys.chunks_exact(layout.head_dim)).enumerate() {
                let (key_panel, value_panels) = head.split_at_mut(key_words(layout));
                let values = values.get(index * layout.head_dim..(index + 1) * layout.head_dim).unwrap_or_default();
                match layout.dtype {
                    Dtype::Float32 => write_f32(key_panel, value_panels, first + position, keys, values),
                    Dtype::Bfloat16 => write_bf16(key_panel, value_panels, first + position, keys, values),
                }
            }
        }
    }
}

#[inline(always)]
fn write_f32(key_panel: &mut [u32], value_panels: &mut [u32], position: usize, keys: &[f32], values: &[f32]) {
    for (step, key) in key_panel.chunks_exact_mut(COLUMNS).zip(keys) {
        step[position] = key.to_bits();
    }
    for (panel, values) in value_panels.chunks_exact_mut(PAGE * COLUMNS).zip(values.chunks(COLUMNS)) {
        for (word, value) in panel[position * COLUMNS..].iter_mut().zip(values) {
            *word = value.to_bits();
        }
    }
}

#[inline(always)]
fn write_bf16(key_panel: &mut [u32], value_panels: &mut [u32], position: usize, keys: &[f32], values: &[f32]) {
    for (step, key) in key_panel.chunks_exact_mut(COLUMNS).zip(keys.as_chunks::<2>().0) {
        step[position] = bf16_bits(key[0]) | (bf16_bits(key[1]) << 16);
    }
    let shift = 16 * (position % 2) as u32;
    for (panel, values) in value_panels.chunks_exact_mut(PAGE / 2 * COLUMNS).zip(values.chunks(COLUMNS)) {
        for (word, value) in panel[position / 2 * COLUMNS..].iter_mut().zip(values) {
            *word = (*word & !(0xffff << shift)) | (bf16_bits(*value) << shift);
        }
    }
}

vectorised! {
    /// A panel of keys (values as steps, positions as columns) as one of values (positions as steps, values as columns).
    fn turn_f32(keys: &[u32], values: &mut [u32]) {
        for (value, keys) in keys.as_chunks::<PAGE>().0.iter().enumerate() {
            for (target, key) in values.chunks_exact_mut(COLUMNS).zip(keys) {
                target[value] = *key;
            }
        }
    }
}

vectorised! {
    /// [`turn_f32`] of pairs of values, which become pairs of positions.
    fn turn_bf16(keys: &[u32], values: &mut [u32]) {
        for (pair, keys) in keys.as_chunks::<PAGE>().0.iter().enumerate() {
            for (target, [one, next]) in values.chunks_exact_mut(COLUMNS).zip(keys.as_chunks::<2>().0) {
                target[2 * pair] = (one & 0xffff) | (next << 16);
                target[2 * pair + 1] = (one >> 16) | (next & 0xffff_0000);
            }
        }
    }
}
