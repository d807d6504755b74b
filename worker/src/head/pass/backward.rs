//! The way back.

use carryon_crds::job::Task;

use super::attention::AttentionBackward;
use super::elementwise::{GateGradients, gated_backward, silu_mul_backward};
use super::linear::{Stack, transpose, weight_gradient};
use super::norm::norm_backward;
use super::pooling::pool_backward;
use super::{DOWN, GATE_UP, Gate, INPUT_NORM, Inside, O, POST_NORM, PackedBatch, Pass, QKV, Saved, bridge, in_block};
use crate::head::layers::{self, Angles};
use crate::head::{Weight, Weights};
use crate::kernel::cpu;

/// Takes a weight's gradient, as long as the weight: by name, with the weight, which nothing reads again in this pass.
pub type Take<'a> = dyn FnMut(&str, &mut Weight, &[f32]) + 'a;

impl Pass {
    /// Hands the gradient of every weight to `take`, from the head's end to its bridge. `by_output` is the loss' derivative by the output of the forward
    /// pass that kept `saved`, row-major; weights and batch are those of that pass.
    pub fn backward(&self, weights: &mut Weights, batch: &PackedBatch, saved: Saved, by_output: &[f32], take: &mut Take<'_>) {
        let Saved { mut blocks, u, gate } = saved;
        let angles = self.angles(batch);
        let mut way = Back { pass: self, weights, take };
        let mut du = match self.shape.task {
            Task::CausalLM => way.delta(batch, &u, gate, by_output),
            Task::Classification => way.class_logits(batch, &u, by_output),
        };
        drop(u);
        for index in (0..self.shape.blocks).rev() {
            let Some((input, inside)) = blocks.pop() else { break };
            let again = || self.block(way.weights, index, &angles, &batch.lengths, &input).0;
            let inside = inside.unwrap_or_else(again);
            way.block(index, &angles, &batch.lengths, &input, inside, &mut du);
        }
        let rows = du.len() / self.attention.width;
        let transposed = transpose(&self.threads, &du, rows, self.attention.width);
        for (index, tap) in batch.taps.iter().enumerate() {
            let x = self.normed_tap(tap, batch.dtype);
            way.give(&bridge(index), &weight_gradient(&self.threads, &transposed, &x, rows));
        }
    }
}

struct Back<'a, 'b> {
    pass: &'a Pass,
    weights: &'a mut Weights,
    take: &'a mut Take<'b>,
}

impl Back<'_, '_> {
    fn give(&mut self, name: &str, gradient: &[f32]) {
        if let Some(weight) = self.weights.get_mut(name) {
            (self.take)(name, weight, gradient);
        }
    }

    /// Through `y = x · Wᵀ` of the matrices `names`, one below the other, on `m` rows: gives their gradients, and `dx`.
    fn linear(&mut self, names: &[String], x: &[f32], dy: &[f32], m: usize) -> Vec<f32> {
        let threads = &self.pass.threads;
        let stack = Stack(names.iter().map(|name| &self.weights[name]).collect());
        let dx = stack.backward(threads, dy);
        let gradient = weight_gradient(threads, &transpose(threads, dy, m, dy.len() / m), x, m);
        let mut rest = &gradient[..];
        for name in names {
            let (own, after) = rest.split_at(self.weights[name].values.len());
            rest = after;
            self.give(name, own);
        }
        dx
    }

    /// Through RMSNorm with the weight `name`, or ones.
    fn norm(&mut self, name: Option<&str>, x: &[f32], dy: &[f32]) -> Vec<f32> {
        let (pass, ones) = (self.pass, vec![1.0; self.pass.attention.width]);
        let weight = name.map_or(&ones, |name| &self.weights[name].values);
        let (dx, dw) = norm_backward(&pass.threads, x, weight, pass.epsilon(), dy);
        if let Some(name) = name {
            self.give(name, &dw);
        }
        dx
    }

    /// From the gradient by `g ⊙ Δ` to that by u, `[rows, w]`.
    fn delta(&mut self, batch: &PackedBatch, u: &[f32], gate: Option<Gate>, dy: &[f32]) -> Vec<f32> {
        let (pass, m, width) = (self.pass, batch.rows.len(), self.pass.attention.width);
        let targets = pass.targets(batch, u);
        let normed = pass.plain_norm(&targets);
        let dnormed = match gate {
            None => self.linear(&["output.weight".to_owned()], &normed, dy, m),
            Some(Gate { z, delta }) => {
                let by = gated_backward(&pass.threads, &z, &self.weights["gate.bias"].values, &delta, dy);
                let GateGradients { z: dz, bias, delta: ddelta } = by;
                self.give("gate.bias", &bias);
                let mut dnormed = self.linear(&["output.weight".to_owned()], &normed, &ddelta, m);
                cpu::add(&mut dnormed, &self.linear(&["gate.weight".to_owned()], &normed, &dz, m));
                dnormed
            }
        };
        let dtargets = self.norm(None, &targets, &dnormed);
        let mut du = vec![0.0; u.len()];
        for (row, dtarget) in batch.rows.iter().zip(dtargets.chunks_exact(width)) {
            cpu::add(&mut du[*row as usize * width..][..width], dtarget);
        }
        du
    }

    /// From the gradient by the logits to that by u, `[rows, w]`.
    fn class_logits(&mut self, batch: &PackedBatch, u: &[f32], dy: &[f32]) -> Vec<f32> {
        let (pass, sequences) = (self.pass, batch.lengths.len());
        let normed = pass.plain_norm(u);
        let pooling = &self.weights["pooling.weight"].values;
        let pooled = layers::pool(&normed, pooling, &batch.lengths);
        let mut dbias = vec![0.0; dy.len() / sequences];
        dy.chunks_exact(dbias.len()).for_each(|row| cpu::add(&mut dbias, row));
        let dpooled = self.linear(&["classifier.weight".to_owned()], &pooled, dy, sequences);
        let (dnormed, dpooling) = pool_backward(&normed, &self.weights["pooling.weight"].values, &batch.lengths, &dpooled);
        self.give("classifier.bias", &dbias);
        self.give("pooling.weight", &dpooling);
        self.norm(None, u, &dnormed)
    }

    /// Through a block: `du` becomes the gradient by its input.
    fn block(&mut self, index: u32, angles: &Angles, lengths: &[usize], input: &[f32], inside: Inside, du: &mut [f32]) {
        let names = |parts: &[&str]| parts.iter().map(|part| in_block(index, part)).collect::<Vec<_>>();
        let (pass, m) = (self.pass, du.len() / self.pass.attention.width);
        let (threads, f) = (&*pass.threads, pass.shape.feed_forward as usize);
        let Inside { qkv, attended, middle, gate_up } = inside;

        let dhidden = self.linear(&names(DOWN), &layers::silu_mul(threads, &gate_up, f), du, m);
        let dgate_up = silu_mul_backward(threads, &gate_up, &dhidden, f);
        drop((gate_up, dhidden));
        let post_norm = in_block(index, POST_NORM);
        let normed = pass.norm(&middle, &self.weights[&post_norm]);
        let dnormed = self.linear(&names(GATE_UP), &normed, &dgate_up, m);
        drop((normed, dgate_up));
        cpu::add(du, &self.norm(Some(&post_norm), &middle, &dnormed));

        let dattended = self.linear(&names(O), &attended, du, m);
        let way = AttentionBackward { threads, attention: &pass.attention, angles, lengths };
        let dqkv = way.gradient(&qkv, &dattended);
        drop((qkv, dattended, attended));
        let input_norm = in_block(index, INPUT_NORM);
        let normed = pass.norm(input, &self.weights[&input_norm]);
        let dnormed = self.linear(&names(QKV), &normed, &dqkv, m);
        cpu::add(du, &self.norm(Some(&input_norm), input, &dnormed));
    }
}
