//! Causal attention over cached keys and values, which lie packed for the tile kernel.

use std::cell::RefCell;

use super::Precision;
use super::operand::{pack_row, words};
use super::rows::{exponentials, scale};
use super::threads::{Disjoint, Threads};
use super::tile::{self, COLUMNS, OUTPUT, ROWS, Right};

/// Positions of a block: one panel of keys.
const BLOCK: usize = COLUMNS;

/// Keys (rotated at absolute positions) and values of one sequence in one layer.
///
/// A block holds 32 positions; per key/value head it has one panel of keys (32 positions as columns, head values as steps) and panels
/// of values (head values as columns, positions as steps). Absent positions are zero.
#[derive(Clone)]
pub struct KeyValues {
    words: Vec<u32>,
    length: usize,
    heads: usize,
    head_dim: usize,
    precision: Precision,
}

impl KeyValues {
    /// An empty cache of `heads` key/value heads of `head_dim` values (an even number).
    pub fn new(heads: usize, head_dim: usize, precision: Precision) -> Self {
        assert!(heads > 0 && head_dim > 0 && head_dim.is_multiple_of(2), "no cache for {heads} heads of {head_dim} values");
        Self { words: Vec::new(), length: 0, heads, head_dim, precision }
    }

    /// Positions held.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether no position is held.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Bytes of memory in use.
    pub fn bytes(&self) -> usize {
        self.words.capacity() * 4
    }

    /// Bytes that `positions` positions take.
    pub fn bytes_for(&self, positions: usize) -> usize {
        positions.div_ceil(BLOCK) * self.block_words() * 4
    }

    /// Forgets all positions from `length` on.
    pub fn truncate(&mut self, length: usize) {
        if length < self.length {
            self.length = length;
            self.words.truncate(length.div_ceil(BLOCK) * self.block_words());
            // What follows the last position must be zero: attention multiplies it by zero, and 0 · NaN is NaN.
            let (heads, head_dim, precision) = (self.heads, self.head_dim, self.precision);
            if !length.is_multiple_of(BLOCK) {
                let start = length / BLOCK * self.block_words();
                let zeros = vec![0.0; heads * head_dim];
                for column in length % BLOCK..BLOCK {
                    write_position(&mut self.words[start..], heads, head_dim, precision, column, &zeros, &zeros);
                }
            }
        }
    }

    /// Appends `count` positions: `rows(i)` gives keys and values of the i-th, each `heads · head_dim` long.
    pub fn append<'r>(&mut self, threads: &Threads, count: usize, rows: impl Fn(usize) -> (&'r [f32], &'r [f32]) + Sync) {
        let (start, block_words) = (self.length, self.block_words());
        let (heads, head_dim, precision) = (self.heads, self.head_dim, self.precision);
        self.length += count;
        self.words.resize(self.length.div_ceil(BLOCK) * block_words, 0);
        let first_block = start / BLOCK;
        threads.for_rows(&mut self.words[first_block * block_words..], block_words, 1, |index, block| {
            let positions = ((first_block + index) * BLOCK).max(start)..((first_block + index + 1) * BLOCK).min(start + count);
            for position in positions {
                let (keys, values) = rows(position - start);
                write_position(block, heads, head_dim, precision, position % BLOCK, keys, values);
            }
        });
    }

    fn key_words(&self) -> usize {
        words(self.precision, self.head_dim) * COLUMNS
    }

    fn value_panels(&self) -> usize {
        self.head_dim.div_ceil(COLUMNS)
    }

    /// Words of one head's panel of values: 32 positions by 32 values.
    fn value_panel_words(&self) -> usize {
        words(self.precision, BLOCK) * COLUMNS
    }

    fn head_words(&self) -> usize {
        self.key_words() + self.value_panels() * self.value_panel_words()
    }

    fn block_words(&self) -> usize {
        self.heads * self.head_words()
    }

    /// Keys of `head` from block `first` on, one panel a block.
    fn keys(&self, head: usize, first: usize) -> Right<'_> {
        let start = first * self.block_words() + head * self.head_words();
        let steps = words(self.precision, self.head_dim);
        Right { words: &self.words[start..], panel_stride: self.block_words(), steps, segments: 1, segment_stride: 0 }
    }

    /// Value panels of `head` from panel `panel` on, over `blocks` blocks from `first` on.
    fn values(&self, head: usize, panel: usize, first: usize, blocks: usize) -> Right<'_> {
        let start = first * self.block_words() + head * self.head_words() + self.key_words() + panel * self.value_panel_words();
        let steps = words(self.precision, BLOCK);
        let (panel_stride, segment_stride) = (self.value_panel_words(), self.block_words());
        Right { words: &self.words[start..], panel_stride, steps, segments: blocks, segment_stride }
    }
}

/// Writes position `column` of a block.
fn write_position(block: &mut [u32], heads: usize, head_dim: usize, precision: Precision, column: usize, keys: &[f32], values: &[f32]) {
    let (key_steps, value_steps) = (words(precision, head_dim), words(precision, BLOCK));
    let head_words = block.len() / heads;
    for ((head, keys), values) in block.chunks_exact_mut(head_words).zip(keys.chunks_exact(head_dim)).zip(values.chunks_exact(head_dim)) {
        let (key_panel, value_panels) = head.split_at_mut(key_steps * COLUMNS);
        match precision {
            Precision::F32 => {
                for (step, key) in keys.iter().enumerate() {
                    key_panel[step * COLUMNS + column] = key.to_bits();
                }
                for (index, value) in values.iter().enumerate() {
                    value_panels[(index / COLUMNS * value_steps + column) * COLUMNS + index % COLUMNS] = value.to_bits();
                }
            }
            Precision::Bf16 => {
                let mut packed = [0u32; 1];
                for (step, pair) in keys.chunks(2).enumerate() {
                    pack_row(precision, pair, &mut packed);
                    key_panel[step * COLUMNS + column] = packed[0];
                }
                let shift = 16 * (column % 2);
                for (index, value) in values.iter().enumerate() {
                    pack_row(precision, &[*value], &mut packed);
                    let word = &mut value_panels[(index / COLUMNS * value_steps + column / 2) * COLUMNS + index % COLUMNS];
                    *word = (*word & !(0xffff << shift)) | (packed[0] << shift);
                }
            }
        }
    }
}

/// How queries see keys.
#[derive(Clone, Copy, Debug)]
pub struct Attention {
    /// Query heads; a multiple of the cache's heads.
    pub heads: usize,
    /// Factor of the scores, usually 1/√head_dim.
    pub scale: f32,
    /// Positions each position sees at most, itself included; all before it when absent.
    pub window: Option<usize>,
}

/// The queries of one sequence: its last `rows` positions.
pub struct Span<'a> {
    /// Number of queries.
    pub rows: usize,
    /// Keys and values, those of the queries' own positions included.
    pub cache: &'a KeyValues,
}

/// Attention of rotated queries, rows `stride` floats apart with `heads · head_dim` values each, those of all spans concatenated.
/// `output` gets packed rows in the caches' precision: [`words`]`(precision, heads · head_dim)` each.
///
/// The order of every sum is fixed by absolute positions: scores are chains over the head's values, the softmax sums lane by lane from a
/// multiple of 32, the values are one chain over positions. Neighbours in a tile only add exact zeros.
pub fn attend(threads: &Threads, attention: Attention, queries: &[f32], stride: usize, spans: &[Span<'_>], output: &mut [u32]) {
    let mut tasks = Vec::new();
    let mut first_row = 0;
    for span in spans {
        assert!(span.rows <= span.cache.length, "more queries than positions");
        let group = attention.heads / span.cache.heads;
        for first in (0..span.rows * group).step_by(ROWS) {
            let queries = ROWS.min(span.rows * group - first);
            tasks.extend((0..span.cache.heads).map(|head| Tile { span, first_row, head, first, queries }));
        }
        first_row += span.rows;
    }
    let width = spans.first().map_or(0, |span| attention.heads * span.cache.head_dim);
    assert!(first_row == 0 || queries.len() >= (first_row - 1) * stride + width, "too few queries");
    let output = Disjoint::new(output);
    // Several tiles a block keep the cost of handing out small; the longest come first.
    let (count, per_block) = (tasks.len(), (tasks.len() / (8 * threads.count())).clamp(1, 16));
    threads.run_blocks(count.div_ceil(per_block), |block| {
        SCRATCH.with_borrow_mut(|scratch| {
            for index in block * per_block..((block + 1) * per_block).min(count) {
                tasks[count - 1 - index].run(&attention, queries, stride, scratch, &output);
            }
        });
    });
}

#[derive(Default)]
struct Scratch {
    queries: Vec<u32>,
    scores: Vec<f32>,
    weights: Vec<u32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// Up to 12 queries of one key/value head: query `q` is head `q mod group` of the span's row `q / group`.
struct Tile<'a> {
    span: &'a Span<'a>,
    first_row: usize,
    head: usize,
    first: usize,
    queries: usize,
}

impl Tile<'_> {
    fn run(&self, attention: &Attention, queries: &[f32], stride: usize, scratch: &mut Scratch, output: &Disjoint<'_, u32>) {
        let cache = self.span.cache;
        let group = attention.heads / cache.heads;
        let position = |query: usize| cache.length - self.span.rows + (self.first + query) / group;
        let visible = |query: usize| attention.window.map_or(0, |window| (position(query) + 1).saturating_sub(window))..position(query) + 1;
        let blocks = visible(0).start / BLOCK..visible(self.queries - 1).end.div_ceil(BLOCK);
        let keys = blocks.len() * BLOCK;
        self.pack_queries(attention, queries, stride, scratch);
        self.score(blocks.clone(), keys, scratch);

        let row_words = words(cache.precision, keys);
        scratch.weights.resize(self.queries * row_words, 0);
        let mut sums = [0.0; ROWS];
        for (query, row) in scratch.scores.chunks_exact_mut(keys).take(self.queries).enumerate() {
            let (start, end) = (visible(query).start - blocks.start * BLOCK, visible(query).end - blocks.start * BLOCK);
            row[..start].fill(f32::NEG_INFINITY);
            (_, sums[query]) = exponentials(&mut row[..end]);
            row[end..].fill(0.0);
            pack_row(cache.precision, row, &mut scratch.weights[query * row_words..][..row_words]);
        }
        self.combine(blocks, row_words, &sums, attention, scratch, output);
    }

    /// Index of a query's head in the row, and its row among all spans' rows.
    fn place(&self, query: usize, group: usize) -> (usize, usize) {
        let query = self.first + query;
        (self.head * group + query % group, self.first_row + query / group)
    }

    fn pack_queries(&self, attention: &Attention, queries: &[f32], stride: usize, scratch: &mut Scratch) {
        let (cache, group) = (self.span.cache, attention.heads / self.span.cache.heads);
        let steps = words(cache.precision, cache.head_dim);
        scratch.queries.resize(ROWS * steps, 0);
        scratch.scores.resize(cache.head_dim, 0.0);
        for query in 0..self.queries {
            let (head, row) = self.place(query, group);
            let scaled = &mut scratch.scores[..cache.head_dim];
            scaled.copy_from_slice(&queries[row * stride + head * cache.head_dim..][..cache.head_dim]);
            scale(scaled, attention.scale);
            pack_row(cache.precision, scaled, &mut scratch.queries[query * steps..][..steps]);
        }
    }

    fn score(&self, blocks: std::ops::Range<usize>, keys: usize, scratch: &mut Scratch) {
        let cache = self.span.cache;
        let left = tile::Left { words: &scratch.queries, stride: words(cache.precision, cache.head_dim), rows: self.queries };
        let together = tile::panels_together(self.queries);
        let mut output = [0.0; OUTPUT];
        scratch.scores.resize(ROWS * keys, 0.0);
        for first in blocks.clone().step_by(together) {
            let panels = together.min(blocks.end - first);
            tile::multiply(cache.precision, left, cache.keys(self.head, first), panels, &mut output);
            for (panel, tile) in output.chunks_exact(self.queries * COLUMNS).take(panels).enumerate() {
                for (query, scores) in tile.chunks_exact(COLUMNS).enumerate() {
                    scratch.scores[query * keys + (first + panel - blocks.start) * BLOCK..][..BLOCK].copy_from_slice(scores);
                }
            }
        }
    }

    fn combine(
        &self,
        blocks: std::ops::Range<usize>,
        row_words: usize,
        sums: &[f32; ROWS],
        attention: &Attention,
        scratch: &mut Scratch,
        target: &Disjoint<'_, u32>,
    ) {
        let (cache, group) = (self.span.cache, attention.heads / self.span.cache.heads);
        let left = tile::Left { words: &scratch.weights, stride: row_words, rows: self.queries };
        let width = words(cache.precision, attention.heads * cache.head_dim);
        let mut output = [0.0; OUTPUT];
        for panel in 0..cache.value_panels() {
            tile::multiply(cache.precision, left, cache.values(self.head, panel, blocks.start, blocks.len()), 1, &mut output);
            let columns = COLUMNS.min(cache.head_dim - panel * COLUMNS);
            for (query, values) in output.chunks_exact_mut(COLUMNS).take(self.queries).enumerate() {
                scale(&mut values[..columns], 1.0 / sums[query]);
                let (head, row) = self.place(query, group);
                let start = row * width + words(cache.precision, head * cache.head_dim + panel * COLUMNS);
                // SAFETY: each query's head belongs to one tile, and each of its panels is written once.
                pack_row(cache.precision, &values[..columns], unsafe { target.slice(start, words(cache.precision, columns)) });
            }
        }
    }
}
