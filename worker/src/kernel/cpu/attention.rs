//! Causal attention over pages of keys and values.

use std::cell::RefCell;
use std::ops::Range;

use super::operand::{pack_row, words};
use super::pages::Pages;
use super::rows::{exponentials, scale, softcap};
use super::threads::{Disjoint, Threads};
use super::tile::{self, COLUMNS, OUTPUT, ROWS, Right};
use crate::kernel::{Attention, PAGE, Span, first_seen};

/// Rotated queries: rows `stride` floats apart with `heads · head_dim` values each, those of all spans concatenated.
#[derive(Clone, Copy)]
pub struct Queries<'a> {
    /// The rows.
    pub values: &'a [f32],
    /// Floats from one to the next.
    pub stride: usize,
}

/// Tiles of queries that share a panel of values where it has to be turned first.
const SHARING: usize = 4;

/// Attention of queries to the pages of their spans. `output` gets packed rows in the pages' number type: [`words`]`(dtype, heads · value_dim)` each.
///
/// The order of every sum is fixed by absolute positions: scores are chains over the head's values, the softmax sums lane by lane from a
/// multiple of 32, the values are one chain over positions. Neighbours in a tile only add exact zeros.
pub fn attend(
    threads: &Threads,
    pages: &Pages,
    layer: usize,
    attention: Attention,
    queries: Queries<'_>,
    spans: &[Span<'_>],
    output: &mut [u32],
) {
    let layout = pages.layout();
    let group = attention.heads / layout.heads;
    let most = if layout.latent.is_some() { SHARING * ROWS } else { ROWS };
    let mut tasks = Vec::new();
    let mut first_row = 0;
    for span in spans {
        assert!(span.rows <= span.length, "more queries than positions");
        for first in (0..span.rows * group).step_by(most) {
            let queries = most.min(span.rows * group - first);
            tasks.extend((0..layout.heads).map(|head| Tile { pages, layer, attention, group, span, first_row, head, first, queries }));
        }
        first_row += span.rows;
    }
    let width = attention.heads * layout.head_dim;
    assert!(first_row == 0 || queries.values.len() >= (first_row - 1) * queries.stride + width, "too few queries");
    assert_eq!(output.len(), first_row * words(layout.dtype, attention.heads * layout.value_dim()), "output has not {first_row} rows");
    let output = Disjoint::new(output);
    // Several tiles a block keep the cost of handing out small; the longest come first.
    let (count, per_block) = (tasks.len(), (tasks.len() / (8 * threads.count())).clamp(1, 16));
    threads.run_blocks(count.div_ceil(per_block), |block| {
        SCRATCH.with_borrow_mut(|scratch| {
            for index in block * per_block..((block + 1) * per_block).min(count) {
                tasks[count - 1 - index].run(queries, scratch, &output);
            }
        });
    });
}

/// The buffers of one tile.
#[derive(Default)]
struct Scratch {
    /// One query, scaled.
    scaled: Vec<f32>,
    /// All of them, packed.
    queries: Vec<u32>,
    /// Queries × keys; then the exponentials of them.
    scores: Vec<f32>,
    /// Those, packed.
    weights: Vec<u32>,
    /// Their sum for each query.
    sums: Vec<f32>,
    /// A panel of values that had to be turned.
    turned: Vec<u32>,
    /// 32 values of what each query gets.
    context: Vec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// Some queries of one key/value head, of which up to 12 go through a product together: query `q` is head `q mod group` of the span's row `q / group`.
struct Tile<'a> {
    pages: &'a Pages,
    layer: usize,
    attention: Attention,
    /// Query heads of a key/value head.
    group: usize,
    span: &'a Span<'a>,
    /// The span's first row among the rows of all spans.
    first_row: usize,
    head: usize,
    first: usize,
    queries: usize,
}

impl Tile<'_> {
    fn run(&self, queries: Queries<'_>, scratch: &mut Scratch, output: &Disjoint<'_, u32>) {
        self.pack_queries(queries, scratch);
        let blocks = self.visible(0).start / PAGE..self.visible(self.queries - 1).end.div_ceil(PAGE);
        self.score(blocks.clone(), scratch);
        self.weigh(blocks.clone(), scratch);
        self.sum_values(blocks, scratch, output);
    }

    /// The positions that a query sees.
    fn visible(&self, query: usize) -> Range<usize> {
        let end = self.span.length - self.span.rows + (self.first + query) / self.group + 1;
        first_seen(self.attention.window, end - 1)..end
    }

    /// Index of a query's head in the row, and its row among all spans' rows.
    fn place(&self, query: usize) -> (usize, usize) {
        let query = self.first + query;
        (self.head * self.group + query % self.group, self.first_row + query / self.group)
    }

    fn pack_queries(&self, queries: Queries<'_>, scratch: &mut Scratch) {
        let (dtype, head_dim) = (self.pages.layout().dtype, self.pages.layout().head_dim);
        let steps = words(dtype, head_dim);
        scratch.queries.resize(self.queries * steps, 0);
        scratch.scaled.resize(head_dim, 0.0);
        for query in 0..self.queries {
            let (head, row) = self.place(query);
            scratch.scaled.copy_from_slice(&queries.values[row * queries.stride + head * head_dim..][..head_dim]);
            scale(&mut scratch.scaled, self.attention.scale);
            pack_row(dtype, &scratch.scaled, &mut scratch.queries[query * steps..][..steps]);
        }
    }

    /// Scores of all queries and the keys of `blocks`.
    fn score(&self, blocks: Range<usize>, scratch: &mut Scratch) {
        let (dtype, keys) = (self.pages.layout().dtype, blocks.len() * PAGE);
        let steps = words(dtype, self.pages.layout().head_dim);
        scratch.scores.resize(self.queries * keys, 0.0);
        for (queries, scores) in scratch.queries.chunks(ROWS * steps).zip(scratch.scores.chunks_mut(ROWS * keys)) {
            let left = tile::Left { words: queries, stride: steps, rows: queries.len() / steps };
            let together = tile::panels_together(left.rows);
            for first in blocks.clone().step_by(together) {
                let count = together.min(blocks.end - first);
                let keys_of = |panel: usize| self.pages.keys(self.span.pages[first + panel], self.layer, self.head);
                let panels: [&[u32]; 4] = std::array::from_fn(|panel| if panel < count { keys_of(panel) } else { &[] });
                let mut output = [0.0; OUTPUT];
                tile::multiply(dtype, left, Right { panels: &panels[..count], steps }, &mut output);
                for (panel, tile) in output.chunks_exact(left.rows * COLUMNS).take(count).enumerate() {
                    for (query, found) in tile.chunks_exact(COLUMNS).enumerate() {
                        scores[query * keys + (first + panel - blocks.start) * PAGE..][..PAGE].copy_from_slice(found);
                    }
                }
            }
        }
    }

    /// Exponentials of the scores, zero where a query does not see, packed; and their sums.
    fn weigh(&self, blocks: Range<usize>, scratch: &mut Scratch) {
        let (dtype, keys) = (self.pages.layout().dtype, blocks.len() * PAGE);
        let row_words = words(dtype, keys);
        scratch.weights.resize(self.queries * row_words, 0);
        scratch.sums.resize(self.queries, 0.0);
        for (query, row) in scratch.scores.chunks_exact_mut(keys).take(self.queries).enumerate() {
            let (start, end) = (self.visible(query).start - blocks.start * PAGE, self.visible(query).end - blocks.start * PAGE);
            if let Some(cap) = self.attention.softcap {
                softcap(&mut row[start..end], cap);
            }
            row[..start].fill(f32::NEG_INFINITY);
            (_, scratch.sums[query]) = exponentials(&mut row[..end]);
            row[end..].fill(0.0);
            pack_row(dtype, row, &mut scratch.weights[query * row_words..][..row_words]);
        }
    }

    fn sum_values(&self, blocks: Range<usize>, scratch: &mut Scratch, target: &Disjoint<'_, u32>) {
        let (dtype, value_dim) = (self.pages.layout().dtype, self.pages.layout().value_dim());
        let (stride, steps) = (words(dtype, blocks.len() * PAGE), words(dtype, PAGE));
        let width = words(dtype, self.attention.heads * value_dim);
        let Scratch { weights, sums, turned, context, .. } = scratch;
        for panel in 0..value_dim.div_ceil(COLUMNS) {
            context.clear();
            context.resize(self.queries * COLUMNS, 0.0);
            for (index, page) in self.span.pages[blocks.clone()].iter().enumerate() {
                let values = self.pages.values(*page, self.layer, self.head, panel, turned);
                for (weights, output) in weights.chunks(ROWS * stride).zip(context.chunks_mut(ROWS * COLUMNS)) {
                    let left = tile::Left { words: &weights[index * steps..], stride, rows: output.len() / COLUMNS };
                    tile::multiply(dtype, left, Right { panels: &[values], steps }, output);
                }
            }
            let columns = COLUMNS.min(value_dim - panel * COLUMNS);
            for (query, values) in context.chunks_exact_mut(COLUMNS).enumerate() {
                scale(&mut values[..columns], 1.0 / sums[query]);
                let (head, row) = self.place(query);
                let start = row * width + words(dtype, head * value_dim + panel * COLUMNS);
                // SAFETY: each query's head belongs to one tile, and each of its panels is written once.
                pack_row(dtype, &values[..columns], unsafe { target.slice(start, words(dtype, columns)) });
            }
        }
    }
}
