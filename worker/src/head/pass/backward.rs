//! The way back.

use carryon_crds::job::Task;

use super::attention::AttentionBackward;
use super::elementwise::silu_mul_backward;
use super::linear::{Stack, inputs, times, transpose, transpose_columns};
use super::norm::norm_backward;
use super::pooling::pool_backward;
use super::{DOWN, GATE_UP, INPUT_NORM, Inside, O, POST_NORM, PackedBatch, Pass, QKV, Saved, bridge, in_block};
use crate::head::layers::{self, Angles};
use crate::head::{Weight, Weights};
use crate::kernel::cpu;

/// Takes a weight's gradient, as long as the weight: by name, with the weight, which nothing reads again in this pass.
pub type Take<'a> = dyn FnMut(&str, &mut Weight, Vec<f32>) + 'a;

impl Pass {
    /// Hands the gradient of every weight to `take`, from the head's end to its bridge. `by_output` is the loss' derivative by the output of the forward
    /// pass that kept `saved`, row-major; weights and batch are those of that pass.
    pub fn backward(&self, weights: &mut Weights, batch: &PackedBatch, saved: Saved, by_output: Vec<f32>, take: &mut Take<'_>) {
        let Saved { mut blocks, u, tiles } = saved;
        let angles = self.angles(batch);
        let mut way = Back { pass: self, weights, take };
        let mut du = match self.shape.task {
            Task::CausalLM => way.delta(batch, u, tiles, by_output),
            _ => way.class_logits(batch, &u, &by_output),
        };
        for index in (0..self.shape.blocks).rev() {
            let Some((input, inside)) = blocks.pop() else { break };
            let again = || self.block(way.weights, index, &angles, &batch.lengths, &input).0;
            let inside = inside.unwrap_or_else(again);
            way.block(index, &angles, &batch.lengths, &input, inside, &mut du);
        }
        let rows = du.len() / self.attention.width;
        let transposed = transpose(&self.threads, &du, rows, self.attention.width);
        for (index, (tap, format)) in batch.taps.iter().zip(&batch.formats).enumerate() {
            let x = inputs(&self.threads, &self.normed_tap(tap, *format), rows);
            let gradient = times(&self.threads, &transposed, &x);
            drop(x);
            way.give(&bridge(index), gradient);
        }
    }
}

/// On the way.
pub(super) struct Back<'a, 'b> {
    pub pass: &'a Pass,
    pub weights: &'a mut Weights,
    take: &'a mut Take<'b>,
}

impl Back<'_, '_> {
    pub(super) fn give(&mut self, name: &str, gradient: Vec<f32>) {
        if let Some(weight) = self.weights.get_mut(name) {
            (self.take)(name, weight, gradient);
        }
    }

    /// Through `y = x · Wᵀ` of the matrices `names`, one below the other, on `m` rows: gives their gradients, and `dx`.
    pub(super) fn linear(&mut self, names: &[String], x: Vec<f32>, dy: &[f32], m: usize) -> Vec<f32> {
        let (threads, width) = (&self.pass.threads, dy.len() / m);
        let dx = Stack::of(names.iter().map(|name| &self.weights[name])).backward(threads, dy);
        let (packed, mut first) = (inputs(threads, &x, m), 0);
        drop(x);
        for name in names {
            let own = first..first + self.weights[name].shape[0];
            first = own.end;
            let gradient = times(threads, &transpose_columns(threads, dy, m, width, own), &packed);
            self.give(name, gradient);
        }
        dx
    }

    /// Through RMSNorm with the weight `name`, or ones.
    pub(super) fn norm(&mut self, name: Option<&str>, x: &[f32], dy: &[f32]) -> Vec<f32> {
        let pass = self.pass;
        let weight = name.map_or_else(|| vec![1.0; pass.attention.width].into(), |name| self.weights[name].values.floats());
        let (dx, dw) = norm_backward(&pass.threads, x, &weight, pass.epsilon(), dy);
        drop(weight);
        if let Some(name) = name {
            self.give(name, dw);
        }
        dx
    }

    /// From the gradient by the logits to that by u, `[rows, w]`.
    fn class_logits(&mut self, batch: &PackedBatch, u: &[f32], dy: &[f32]) -> Vec<f32> {
        let (pass, sequences) = (self.pass, batch.lengths.len());
        let (rows, lengths) = pass.pooled(batch, u);
        let normed = pass.plain_norm(&rows);
        let pooling = self.weights["pooling.weight"].values.floats().into_owned();
        let pooled = layers::pool(&normed, &pooling, &lengths);
        let mut dbias = vec![0.0; dy.len() / sequences];
        dy.chunks_exact(dbias.len()).for_each(|row| cpu::add(&mut dbias, row));
        let dpooled = self.linear(&["classifier.weight".to_owned()], pooled, dy, sequences);
        let (dnormed, dpooling) = pool_backward(&normed, &pooling, &lengths, &dpooled);
        self.give("classifier.bias", dbias);
        self.give("pooling.weight", dpooling);
        let drows = self.norm(None, &rows, &dnormed);
        if lengths == batch.lengths {
            return drows;
        }
        let (width, mut end, mut rest, mut du) = (pass.attention.width, 0, &drows[..], vec![0.0; u.len()]);
        for (length, pooled) in batch.lengths.iter().zip(lengths) {
            end += length;
            let (own, after) = rest.split_at(pooled * width);
            rest = after;
            du[(end - pooled) * width..end * width].copy_from_slice(own);
        }
        du
    }

    /// Through a block: `du` becomes the gradient by its input.
    fn block(&mut self, index: u32, angles: &Angles, lengths: &[usize], input: &[f32], inside: Inside, du: &mut [f32]) {
        let names = |parts: &[&str]| parts.iter().map(|part| in_block(index, part)).collect::<Vec<_>>();
        let (pass, m) = (self.pass, du.len() / self.pass.attention.width);
        let (threads, f) = (&*pass.threads, pass.shape.feed_forward as usize);
        let Inside { qkv, attended, middle, gate_up } = inside;

        let dhidden = self.linear(&names(DOWN), layers::silu_mul(threads, &gate_up, f), du, m);
        let dgate_up = silu_mul_backward(threads, &gate_up, &dhidden, f);
        drop((gate_up, dhidden));
        let post_norm = in_block(index, POST_NORM);
        let normed = pass.norm(&middle, &self.weights[&post_norm]);
        let dnormed = self.linear(&names(GATE_UP), normed, &dgate_up, m);
        drop(dgate_up);
        cpu::add(du, &self.norm(Some(&post_norm), &middle, &dnormed));

        let dattended = self.linear(&names(O), attended, du, m);
        let way = AttentionBackward { threads, attention: &pass.attention, angles, lengths };
        let dqkv = way.gradient(&qkv, &dattended);
        drop((qkv, dattended));
        let input_norm = in_block(index, INPUT_NORM);
        let normed = pass.norm(input, &self.weights[&input_norm]);
        let dnormed = self.linear(&names(QKV), normed, &dqkv, m);
        cpu::add(du, &self.norm(Some(&input_norm), input, &dnormed));
    }
}
