//! [`Backend`] over our kernels.

use std::borrow::Cow;
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use carryon_crds::pool::Dtype;

use super::buffers::{PackedRows, Places, Rows};
use super::operand::{pack_row, round_bf16, unpack_row, words};
use super::pages::Pages;
use super::panels::Panels;
use super::product::{self, RUN};
use super::rows::{add, add_multiple, add_normalised, exp, normalise_in_place, rms_norm, rope, softcap};
use super::{Threads, isa, loss, outline, sink};
use crate::kernel::{Aim, Attention, Backend, Fill, LOGIT_BLOCK, Left, Outline, PageLayout, Part, Result, Rotation, Sink, Span, Stored};

/// Rows of a block of the row operations.
const BLOCK_ROWS: usize = 32;

/// The CPU: our kernels on a fixed set of threads.
#[derive(Clone)]
pub struct Cpu {
    pub(super) threads: Arc<Threads>,
    /// Number type of products in training.
    pub(super) training: Dtype,
}

impl Cpu {
    /// The CPU with these threads.
    pub fn new(threads: Arc<Threads>) -> Self {
        Self { threads, training: Dtype::Float32 }
    }

    /// The same, which multiplies what it trains, and what Muon makes of its gradients, in numbers of `dtype`. Sums stay f32, and attention too.
    pub fn training_in(self, dtype: Dtype) -> Self {
        Self { training: dtype, ..self }
    }

    /// Runs over rows in place, blocks of them on all threads.
    fn each_row(&self, rows: &mut Rows, run: impl Fn(usize, &mut [f32]) + Sync) {
        let width = rows.width;
        self.threads.for_rows(&mut rows.values, width, BLOCK_ROWS, |first, block| {
            block.chunks_exact_mut(width).enumerate().for_each(|(offset, row)| run(first + offset, row));
        });
    }
}

impl Backend for Cpu {
    type Rows = Rows;
    type Packed = PackedRows;
    type Matrix = Panels;
    type Heads = Vec<Panels>;
    type Vector = Vec<f32>;
    type Pages = Pages;
    type Places = Places;

    fn name(&self, dtype: Dtype) -> (String, String) {
        ("cpu".to_owned(), isa::name(dtype).to_owned())
    }

    fn beside(&self) -> Self {
        Self::new(Threads::new(1))
    }

    fn free_memory(&self) -> Option<u64> {
        None
    }

    fn finish(&self) -> Result<()> {
        Ok(())
    }

    fn matrix(&self, n: usize, k: usize, stored: Stored, fill: Fill<'_>) -> Result<Panels> {
        Ok(Panels::from_rows(n, k, stored, &self.threads, fill))
    }

    /// Gate and up in runs of [`RUN`]; absent outputs of the last runs are zero.
    fn gate_up(&self, width: usize, k: usize, stored: Stored, fill: Fill<'_>) -> Result<Panels> {
        let row_of = |row: usize, values: &mut [f32]| {
            let (half, row) = (row % (2 * RUN) / RUN * width, row / (2 * RUN) * RUN + row % RUN);
            if row < width { fill(half + row, values) } else { values.fill(0.0) }
        };
        Ok(Panels::from_rows(2 * width.next_multiple_of(RUN), k, stored, &self.threads, row_of))
    }

    fn heads(&self, heads: usize, n: usize, k: usize, dtype: Dtype, fill: Fill<'_>) -> Result<Vec<Panels>> {
        let head = |head| Panels::from_rows(n, k, dtype, &self.threads, |row, values| fill(head * n + row, values));
        Ok((0..heads).map(head).collect())
    }

    fn transposed(&self, matrix: &Panels) -> Result<Panels> {
        Ok(matrix.transposed(&self.threads))
    }

    fn vector(&self, values: &[f32]) -> Result<Vec<f32>> {
        Ok(values.to_vec())
    }

    fn shape(matrix: &Panels) -> (usize, usize) {
        (matrix.rows(), matrix.cols())
    }

    fn bytes(matrix: &Panels) -> usize {
        matrix.bytes()
    }

    fn count(rows: &Rows) -> usize {
        rows.count()
    }

    fn write(&self, values: &[f32], width: usize) -> Result<Rows> {
        Ok(Rows { values: values.to_vec(), width })
    }

    fn read<'a>(&self, rows: &'a Rows) -> Result<Cow<'a, [f32]>> {
        Ok(Cow::Borrowed(&rows.values))
    }

    fn read_bytes(&self, rows: &Rows, dtype: Dtype) -> Result<Bytes> {
        Ok(to_bytes(&self.threads, &rows.values, dtype))
    }

    fn read_matrix(&self, matrix: &Panels, rows: Range<usize>) -> Result<Bytes> {
        let mut values = vec![0.0; rows.len() * matrix.cols()];
        for (row, values) in rows.zip(values.chunks_exact_mut(matrix.cols())) {
            matrix.row(row, values);
        }
        // A route's own thread reads: it leaves the device's alone.
        Ok(to_bytes(&Threads::new(1), &values, matrix.dtype()))
    }

    fn embed(&self, table: &Panels, tokens: &[u32], scale: f32, out: &mut Rows) -> Result<()> {
        let width = table.cols();
        self.threads.for_rows(out.shape(tokens.len(), width), width, BLOCK_ROWS, |first, block| {
            for (token, row) in tokens[first..].iter().zip(block.chunks_exact_mut(width)) {
                table.row(*token as usize, row);
                row.iter_mut().for_each(|value| *value *= scale);
            }
        });
        Ok(())
    }

    fn product(&self, left: Left<'_, Self>, right: &[Part<'_, Self>], sink: Sink<'_, Self>) -> Result<()> {
        let right: Vec<_> = right
            .iter()
            .map(|part| product::Part { rows: part.rows, panels: part.matrix, norm: part.norm.map_or(&[], Vec::as_slice) })
            .collect();
        let Some(first) = right.first().map(|part| part.panels) else { return Ok(()) };
        let rows = right.iter().map(|part| part.rows).sum();
        product::product(&self.threads, left_side(&left), &right, shaped(sink, rows, first.rows(), first.dtype()));
        Ok(())
    }

    fn product_heads(&self, left: Left<'_, Self>, right: &Vec<Panels>, sink: Sink<'_, Self>) -> Result<()> {
        let Some(first) = right.first() else { return Ok(()) };
        let rows = match left {
            Left::Plain(rows) | Left::Normed(rows, _) => rows.count(),
            Left::Packed(packed) => packed.words.len() / packed.stride,
        };
        let sink = shaped(sink, rows, right.len() * first.rows(), first.dtype());
        product::product_heads(&self.threads, left_side(&left), rows, right, sink);
        Ok(())
    }

    fn angles(&self, rotation: &Rotation, positions: &[u32], out: &mut Rows) -> Result<()> {
        let pairs = rotation.pairs();
        self.threads.for_rows(out.shape(positions.len(), 2 * pairs), 2 * pairs, BLOCK_ROWS, |first, block| {
            for (position, row) in positions[first..].iter().zip(block.chunks_exact_mut(2 * pairs)) {
                let (cosine, sine) = row.split_at_mut(pairs);
                rotation.at(*position as usize, cosine, sine);
            }
        });
        Ok(())
    }

    fn rotate(&self, rows: &mut Rows, columns: usize, head_dim: usize, angles: &Rows) -> Result<()> {
        self.each_row(rows, |index, row| {
            let (cosine, sine) = angles.row(index).split_at(angles.width / 2);
            rope(&mut row[..columns], head_dim, cosine, sine);
        });
        Ok(())
    }

    fn add_bias(&self, rows: &mut Rows, bias: &Vec<f32>) -> Result<()> {
        self.each_row(rows, |_, row| add(row, bias));
        Ok(())
    }

    fn norm_columns(&self, rows: &mut Rows, columns: Range<usize>, weight: &Vec<f32>, epsilon: f32) -> Result<()> {
        self.each_row(rows, |_, row| {
            row[columns.clone()].chunks_exact_mut(weight.len()).for_each(|part| normalise_in_place(part, weight, epsilon));
        });
        Ok(())
    }

    fn add_normed(&self, target: &mut Rows, rows: &Rows, weight: &Vec<f32>, epsilon: f32) -> Result<()> {
        self.each_row(target, |index, target| add_normalised(target, rows.row(index), weight, epsilon));
        Ok(())
    }

    fn add_scaled(&self, target: &mut Rows, rows: &Rows, at: &[u32], factors: &[f32]) -> Result<()> {
        let mut order: Vec<usize> = (0..at.len()).collect();
        order.sort_by_key(|index| at[*index]);
        self.each_row(target, |row, target| {
            let first = order.partition_point(|index| (at[*index] as usize) < row);
            let own = order[first..].iter().take_while(|index| at[**index] as usize == row);
            own.for_each(|index| add_multiple(target, rows.row(*index), factors[*index]));
        });
        Ok(())
    }

    fn softcap(&self, logits: &mut Rows, cap: f32) -> Result<()> {
        self.each_row(logits, |_, row| softcap(row, cap));
        Ok(())
    }

    fn pages(&self, layout: PageLayout, count: usize) -> Result<Pages> {
        Ok(Pages::new(layout, count))
    }

    fn take_page(&self, pages: &mut Pages, page: u32) -> Result<()> {
        pages.take(page);
        Ok(())
    }

    fn copy_page(&self, pages: &mut Pages, from: u32, to: u32) -> Result<()> {
        pages.copy(from, to);
        Ok(())
    }

    fn give_page(&self, pages: &mut Pages, page: u32) {
        pages.give(page);
    }

    fn places(&self, attention: Attention, spans: &[Span<'_>]) -> Result<Places> {
        Ok(Places::new(attention, spans))
    }

    fn append(&self, pages: &mut Pages, layer: usize, rows: &Rows, column: usize, places: &Places) -> Result<()> {
        pages.append(&self.threads, layer, &rows.values, rows.width, column, &places.spans());
        Ok(())
    }

    fn attend(&self, pages: &Pages, layer: usize, rows: &Rows, places: &Places, out: &mut PackedRows) -> Result<()> {
        let (attention, spans) = (places.attention, places.spans());
        let stride = words(pages.layout().dtype, attention.heads * pages.layout().value_dim());
        let count = spans.iter().map(|span| span.rows).sum();
        let queries = super::Queries { values: &rows.values, stride: rows.width };
        super::attend(&self.threads, pages, layer, attention, queries, &spans, out.shape(count, stride));
        Ok(())
    }

    fn tap(&self, rows: &Rows, which: Option<&[u32]>, norm: Option<(&Vec<f32>, f32)>, dtype: Dtype) -> Result<Rows> {
        let width = rows.width;
        let mut out = Rows::default();
        let target = out.shape(which.map_or(rows.count(), <[u32]>::len), width);
        self.threads.for_rows(target, width, BLOCK_ROWS, |first, block| {
            for (offset, target) in block.chunks_exact_mut(width).enumerate() {
                let row = rows.row(which.map_or(first + offset, |which| which[first + offset] as usize));
                match norm {
                    Some((weight, epsilon)) => rms_norm(row, weight, epsilon, target),
                    None => target.copy_from_slice(row),
                }
            }
            round(block, dtype);
        });
        Ok(out)
    }

    fn pack(&self, rows: &Rows, which: Range<usize>, dtype: Dtype) -> Result<PackedRows> {
        let mut packed = PackedRows::default();
        let (count, stride) = (which.len(), words(dtype, rows.width));
        self.threads.for_rows(packed.shape(count, stride), stride, BLOCK_ROWS, |first, block| {
            for (offset, words) in block.chunks_exact_mut(stride).enumerate() {
                pack_row(dtype, rows.row(which.start + first + offset), words);
            }
        });
        Ok(packed)
    }

    fn unpack(&self, parts: &[&PackedRows], width: usize, dtype: Dtype) -> Result<Rows> {
        let packed: Vec<&[u32]> = parts.iter().flat_map(|part| part.words.chunks_exact(part.stride)).collect();
        let mut rows = Rows::default();
        self.threads.for_rows(rows.shape(packed.len(), width), width, BLOCK_ROWS, |first, block| {
            for (words, row) in packed[first..].iter().zip(block.chunks_exact_mut(width)) {
                unpack_row(dtype, words, row);
            }
        });
        Ok(rows)
    }

    fn gate(&self, z: &Rows, biases: &[(usize, &Vec<f32>)], delta: &mut Rows) -> Result<()> {
        let width = delta.width;
        let biases: Vec<&[f32]> = biases.iter().flat_map(|(rows, bias)| std::iter::repeat_n(bias.as_slice(), *rows)).collect();
        self.threads.for_rows(&mut delta.values, width, BLOCK_ROWS, |first, block| {
            for (offset, delta) in block.chunks_exact_mut(width).enumerate() {
                gate_row(z.row(first + offset), biases[first + offset], delta);
            }
        });
        Ok(())
    }

    fn combine(&self, y: &mut Rows, at: &[u32], alpha: &[f32], delta: &Rows, dtype: Dtype) -> Result<()> {
        let width = y.width;
        for ((at, alpha), delta) in at.iter().zip(alpha).zip(delta.values.chunks_exact(width)) {
            let row = &mut y.values[*at as usize * width..][..width];
            row.iter_mut().zip(delta).for_each(|(y, delta)| *y += alpha * delta);
            round(row, dtype);
        }
        Ok(())
    }

    fn greedy(&self, logits: &Rows) -> Result<Vec<Option<u32>>> {
        let mut found = vec![None; logits.count()];
        self.threads.for_each(&mut found, |row, found| *found = likeliest(logits.row(row)));
        Ok(found)
    }

    fn outline(&self, logits: &Rows, looks: &[(u32, f32)]) -> Result<Outline> {
        let blocks = logits.width.div_ceil(LOGIT_BLOCK);
        let mut found = Outline { maxima: vec![0.0; looks.len() * blocks], weights: vec![0.0; looks.len() * blocks] };
        let mut parts: Vec<_> = found.maxima.chunks_mut(blocks).zip(found.weights.chunks_mut(blocks)).zip(looks).collect();
        self.threads.for_each(&mut parts, |_, ((maxima, weights), (row, temperature))| {
            outline::outline(logits.row(*row as usize), *temperature, maxima, weights);
        });
        Ok(found)
    }

    fn blocks(&self, logits: &Rows, which: &[(u32, u32)]) -> Result<Vec<f32>> {
        let mut values = vec![f32::NEG_INFINITY; which.len() * LOGIT_BLOCK];
        for (out, (row, block)) in values.chunks_exact_mut(LOGIT_BLOCK).zip(which) {
            let rest = &logits.row(*row as usize)[*block as usize * LOGIT_BLOCK..];
            let count = rest.len().min(LOGIT_BLOCK);
            out[..count].copy_from_slice(&rest[..count]);
        }
        Ok(values)
    }

    fn losses(
        &self,
        y: &Rows,
        lm_head: &Panels,
        backward: Option<&Panels>,
        aim: Aim<'_, Self>,
        softcap: Option<f32>,
    ) -> Result<(Vec<f32>, Option<Rows>)> {
        let (loss, gradient) = loss::losses(&self.threads, &y.values, lm_head, backward, &aim, softcap);
        Ok((loss, gradient.map(|values| Rows { values, width: y.width })))
    }
}

fn left_side<'a>(left: &Left<'a, Cpu>) -> product::Left<'a> {
    match left {
        Left::Plain(rows) => product::Left::Plain(&rows.values),
        Left::Normed(rows, epsilon) => product::Left::Normed(&rows.values, *epsilon),
        Left::Packed(packed) => product::Left::Packed(&packed.words, packed.stride),
    }
}

/// The sink in the shape rows × width.
fn shaped<'a>(target: Sink<'a, Cpu>, rows: usize, width: usize, dtype: Dtype) -> sink::Sink<'a> {
    match target {
        Sink::Store(out) => sink::Sink::Store(out.shape(rows, width)),
        Sink::Add(out) => sink::Sink::Add(&mut out.values),
        Sink::Pack(out) => sink::Sink::Pack(out.shape(rows, words(dtype, width))),
        Sink::Gated(out, activation) => sink::Sink::Gated(out.shape(rows, words(dtype, width / 2)), activation),
    }
}

fn round(values: &mut [f32], dtype: Dtype) {
    if dtype == Dtype::Bfloat16 {
        round_bf16(values);
    }
}

fn to_bytes(threads: &Threads, values: &[f32], dtype: Dtype) -> Bytes {
    /// Values that one thread takes at a time.
    const BLOCK: usize = 1 << 14;
    match dtype {
        Dtype::Float32 => Bytes::copy_from_slice(bytemuck::cast_slice(values)),
        Dtype::Bfloat16 => {
            let mut halves = vec![0u16; values.len()];
            threads.for_rows(&mut halves, 1, BLOCK, |first, halves| super::operand::halves(&values[first..][..halves.len()], halves));
            Bytes::from_owner(Halves(halves))
        }
    }
}

/// Numbers of bf16 as the bytes that they are.
struct Halves(Vec<u16>);

impl AsRef<[u8]> for Halves {
    fn as_ref(&self) -> &[u8] {
        bytemuck::cast_slice(&self.0)
    }
}

isa::vectorised! {
    fn gate_row(z: &[f32], bias: &[f32], delta: &mut [f32]) {
        for (delta, (z, bias)) in delta.iter_mut().zip(z.iter().zip(bias)) {
            *delta *= 1.0 / (1.0 + exp(-(z + bias)));
        }
    }
}

isa::vectorised! {
    /// The first of the largest of finite logits.
    fn likeliest(logits: &[f32]) -> Option<u32> {
        const LANES: usize = 16;
        let (mut largest, mut nothing) = ([f32::NEG_INFINITY; LANES], [0.0f32; LANES]);
        for chunk in logits.chunks(LANES) {
            for (lane, logit) in chunk.iter().enumerate() {
                largest[lane] = if *logit > largest[lane] { *logit } else { largest[lane] };
                // Zero, or NaN from the first logit on that is not finite.
                nothing[lane] += logit * 0.0;
            }
        }
        let largest = largest.into_iter().fold(f32::NEG_INFINITY, f32::max);
        let finite = nothing.iter().all(|sum| *sum == 0.0);
        logits.iter().position(|logit| *logit == largest).filter(|_| finite).map(|token| token as u32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_likeliest_token_is_the_first_of_the_largest_of_finite_logits() {
        let cpu = Cpu::new(Threads::new(2));
        let mut rows = vec![0.5; 5 * 37];
        rows[3] = 2.0;
        rows[30] = 2.0;
        rows[37..2 * 37].fill(-3.0);
        rows[2 * 37 + 36] = 7.0;
        rows[3 * 37 + 20] = f32::NAN;
        rows[4 * 37 + 36] = f32::NEG_INFINITY;
        assert_eq!(cpu.greedy(&cpu.write(&rows, 37).unwrap()).unwrap(), [Some(3), Some(0), Some(36), None, None]);
    }

    #[test]
    fn combining_rounds_once_after_the_sum_and_touches_no_other_row() {
        let cpu = Cpu::new(Threads::new(1));
        for (alpha, dtype, expected) in [(0.5, Dtype::Bfloat16, 1.0), (1.0, Dtype::Bfloat16, 1.007_812_5), (0.5, Dtype::Float32, 1.0035)] {
            let mut y = cpu.write(&[f32::MIN_POSITIVE, -0.0, 1.0, 1.0], 2).unwrap();
            cpu.combine(&mut y, &[1], &[alpha], &cpu.write(&[0.007, 0.007], 2).unwrap(), dtype).unwrap();
            assert_eq!(y.values, [f32::MIN_POSITIVE, -0.0, expected, expected]);
            assert!(y.values[1].is_sign_negative());
        }
    }
}
