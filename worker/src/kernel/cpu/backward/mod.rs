//! [`Backward`] over our kernels.

mod attention;
mod elementwise;
mod gate;
mod linear;
mod norm;
mod pooling;

use std::borrow::Cow;
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;

pub(super) use linear::transpose;
pub use pooling::pool;

use super::{Cpu, Panels, Rows, add, update};
use crate::kernel::moment::Moment;
use crate::kernel::{Attention, Backward, Change, Gate, GateGradients, Result, Rule, Step, Weight, Weights};
use crate::numbers::RowFormat;
use attention::Whole;
use linear::{Stack, columns_times, rows_across};

/// One row.
fn row(values: Vec<f32>) -> Rows {
    Rows { width: values.len(), values }
}

impl Cpu {
    fn whole<'a>(&'a self, attention: Attention, angles: &'a Rows, qkv: &Rows, lengths: &'a [usize]) -> Whole<'a> {
        Whole { threads: &self.threads, attention, width: qkv.width / 3, angles, lengths }
    }
}

/// A norm's weight for rows of `width` values.
fn norm_weight(weight: Option<&Weight>, width: usize) -> Cow<'_, [f32]> {
    weight.map_or_else(|| Cow::Owned(vec![1.0; width]), |weight| weight.values.floats())
}

impl Backward for Cpu {
    type Trained = Weight;
    type State = Arc<Moment>;
    type Inputs = Panels;
    type Gated = Vec<gate::Tile>;

    fn train(&self, weights: Arc<Weights>) -> Result<Arc<Weights>> {
        Ok(weights)
    }

    fn trained(&self, weights: &Arc<Weights>) -> Result<Arc<Weights>> {
        Ok(weights.clone())
    }

    fn dimensions(weight: &Weight) -> &[usize] {
        &weight.shape
    }

    fn remember(&self, moment: Arc<Moment>) -> Result<Arc<Moment>> {
        Ok(moment)
    }

    fn remembered(&self, state: &Arc<Moment>) -> Result<Arc<Moment>> {
        Ok(state.clone())
    }

    fn receive(&self, values: Vec<f32>, width: usize) -> Result<Rows> {
        Ok(Rows { values, width })
    }

    fn hand_over(&self, rows: Rows) -> Result<Vec<f32>> {
        Ok(rows.values)
    }

    fn size(rows: &Rows) -> usize {
        rows.values.len()
    }

    fn normed_states(&self, parts: &[Bytes], format: RowFormat, width: usize, epsilon: f32) -> Result<Rows> {
        Ok(Rows { values: norm::normed_states(&self.threads, parts, format, width, epsilon), width })
    }

    fn linear(&self, x: &Rows, weights: &[&Weight], bias: Option<&Weight>) -> Result<Rows> {
        let stack = Stack::of(weights.iter().copied());
        let mut out = Rows { values: stack.forward(self, &x.values), width: stack.rows() };
        if let Some(bias) = bias {
            let bias = bias.values.floats();
            out.values.chunks_exact_mut(bias.len()).for_each(|row| add(row, &bias));
        }
        Ok(out)
    }

    fn linear_back(&self, dy: &Rows, weights: &[&Weight]) -> Result<Rows> {
        let stack = Stack::of(weights.iter().copied());
        Ok(Rows { values: stack.backward(self, &dy.values), width: stack.columns() })
    }

    fn inputs(&self, x: Rows) -> Result<Panels> {
        Ok(rows_across(&self.threads, &x.values, x.width, self.training))
    }

    fn gradient(&self, dy: &Rows, columns: Range<usize>, x: &Panels) -> Result<Rows> {
        Ok(Rows { values: columns_times(&self.threads, &dy.values, dy.width, columns, x), width: x.rows() })
    }

    fn norm(&self, x: &Rows, weight: Option<&Weight>, epsilon: f32) -> Result<Rows> {
        Ok(Rows { values: norm::norm(&self.threads, &x.values, &norm_weight(weight, x.width), epsilon), width: x.width })
    }

    fn norm_back(&self, x: &Rows, weight: Option<&Weight>, epsilon: f32, dy: &Rows) -> Result<(Rows, Rows)> {
        let (dx, dw) = norm::norm_backward(&self.threads, &x.values, &norm_weight(weight, x.width), epsilon, &dy.values);
        Ok((Rows { values: dx, width: x.width }, row(dw)))
    }

    fn silu_mul(&self, gate_up: &Rows) -> Result<Rows> {
        let width = gate_up.width / 2;
        Ok(Rows { values: elementwise::silu_mul(&self.threads, &gate_up.values, width), width })
    }

    fn silu_mul_back(&self, gate_up: &Rows, dy: &Rows) -> Result<Rows> {
        let values = elementwise::silu_mul_backward(&self.threads, &gate_up.values, &dy.values, dy.width);
        Ok(Rows { values, width: gate_up.width })
    }

    fn attend_whole(&self, attention: Attention, angles: &Rows, qkv: &mut Rows, lengths: &[usize]) -> Result<Rows> {
        let values = self.whole(attention, angles, qkv, lengths).forward(&mut qkv.values);
        Ok(Rows { values, width: qkv.width / 3 })
    }

    fn attend_whole_back(&self, attention: Attention, angles: &Rows, qkv: &Rows, lengths: &[usize], dy: &Rows) -> Result<Rows> {
        let values = self.whole(attention, angles, qkv, lengths).gradient(&qkv.values, &dy.values);
        Ok(Rows { values, width: qkv.width })
    }

    fn gated(&self, gate: Gate<'_, Self>, x: &Rows, keep: bool) -> Result<(Rows, Option<Vec<gate::Tile>>)> {
        let (values, kept) = gate::forward(self, &gate, &x.values, keep);
        Ok((Rows { values, width: gate.bias.values.len() }, kept))
    }

    fn gated_back(&self, gate: Gate<'_, Self>, x: &Rows, kept: Option<Vec<gate::Tile>>, dy: Rows) -> Result<GateGradients<Rows>> {
        let by = gate::backward(self, &gate, &x.values, kept, dy.values);
        let rows = |values| Rows { values, width: x.width };
        Ok(GateGradients { x: rows(by.x), output: rows(by.output), gate: rows(by.gate), bias: row(by.bias) })
    }

    fn pool(&self, rows: &Rows, pooling: &Weight, lengths: &[usize]) -> Result<Rows> {
        Ok(Rows { values: pool(&rows.values, &pooling.values.floats(), lengths), width: rows.width })
    }

    fn pool_back(&self, rows: &Rows, pooling: &Weight, lengths: &[usize], dy: &Rows) -> Result<(Rows, Rows)> {
        let (drows, dpooling) = pooling::pool_backward(&rows.values, &pooling.values.floats(), lengths, &dy.values);
        Ok((Rows { values: drows, width: rows.width }, row(dpooling)))
    }

    fn spread(&self, rows: &Rows, at: &[u32], count: usize) -> Result<Rows> {
        let mut out = Rows { values: vec![0.0; count * rows.width], width: rows.width };
        for (at, row) in at.iter().zip(rows.values.chunks_exact(rows.width)) {
            add(&mut out.values[*at as usize * rows.width..][..rows.width], row);
        }
        Ok(out)
    }

    fn sum(&self, rows: &Rows) -> Result<Rows> {
        let mut sum = vec![0.0; rows.width];
        rows.values.chunks_exact(rows.width).for_each(|row| add(&mut sum, row));
        Ok(row(sum))
    }

    fn add(&self, target: &mut Rows, rows: &Rows) -> Result<()> {
        add(&mut target.values, &rows.values);
        Ok(())
    }

    fn scale(&self, rows: &mut Rows, factor: f32) -> Result<()> {
        rows.values.iter_mut().for_each(|value| *value *= factor);
        Ok(())
    }

    fn length<'a>(&self, parts: impl IntoIterator<Item = &'a Rows>) -> Result<f64> {
        let values = parts.into_iter().flat_map(|rows| &rows.values);
        Ok(values.map(|value| f64::from(*value).powi(2)).sum::<f64>().sqrt())
    }

    fn update(&self, step: &Step, changes: &mut [Change<'_, Self>]) -> Result<()> {
        match step.rule {
            Rule::AdamW => changes.iter_mut().for_each(|change| update::adamw(&self.threads, step, change)),
            Rule::Muon => update::muon(self, step, changes),
        }
        Ok(())
    }

    fn average(&self, average: &mut Weight, weight: &Weight, share: f32) -> Result<()> {
        update::average(&self.threads, average, weight, share);
        Ok(())
    }
}
