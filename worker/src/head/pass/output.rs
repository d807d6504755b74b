//! The output and its gate, some columns of D at a time: what is as wide as the base's rows exists no more often than it must.

use std::ops::Range;

use carryon_crds::wire::memory::TILE;

use super::backward::Back;
use super::elementwise::{GateGradients, gated_backward};
use super::linear::{Stack, columns, inputs, times, transpose};
use super::{PackedBatch, Pass};
use crate::head::Weights;
use crate::head::layers;
use crate::kernel::cpu;

/// Some columns of what the gate is computed from, of the rows with a target.
pub(super) struct Tile {
    /// `G · norm(u)`.
    z: Vec<f32>,
    /// `O · norm(u)`.
    delta: Vec<f32>,
}

impl Pass {
    fn tiles(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let width = self.shape.hidden_size as usize;
        (0..width).step_by(TILE).map(move |first| first..(first + TILE).min(width))
    }

    fn tile(&self, weights: &Weights, some: &Range<usize>, normed: &[f32]) -> Tile {
        let product = |name: &str| Stack::part(&weights[name], some.clone()).forward(&self.threads, normed);
        Tile { z: product("gate.weight"), delta: product("output.weight") }
    }

    /// `g ⊙ Δ` of normed rows, `[rows, D]`; `tiles` gets what a gate was computed from.
    pub(super) fn delta(&self, weights: &Weights, normed: &[f32], mut tiles: impl FnMut(Tile)) -> Vec<f32> {
        if !self.shape.gate {
            return Stack::of([&weights["output.weight"]]).forward(&self.threads, normed);
        }
        let (width, bias) = (self.shape.hidden_size as usize, weights["gate.bias"].values.floats());
        let mut out = vec![0.0; normed.len() / self.attention.width * width];
        for some in self.tiles() {
            let tile = self.tile(weights, &some, normed);
            let gated = layers::gated(&self.threads, &tile.z, &bias[some.clone()], &tile.delta);
            for (row, gated) in out.chunks_exact_mut(width).zip(gated.chunks_exact(some.len())) {
                row[some.clone()].copy_from_slice(gated);
            }
            tiles(tile);
        }
        out
    }
}

impl Back<'_, '_> {
    /// From the gradient by `g ⊙ Δ` to that by u, `[rows, w]`.
    pub(super) fn delta(&mut self, batch: &PackedBatch, u: Vec<f32>, tiles: Vec<Tile>, dy: Vec<f32>) -> Vec<f32> {
        let (pass, width) = (self.pass, self.pass.attention.width);
        let (targets, length) = (pass.targets(batch, &u), u.len());
        drop(u);
        let normed = pass.plain_norm(&targets);
        let dnormed = match pass.shape.gate {
            true => self.gated(&normed, batch.rows.len(), tiles, dy),
            false => self.linear(&["output.weight".to_owned()], normed, &dy, batch.rows.len()),
        };
        let dtargets = self.norm(None, &targets, &dnormed);
        let mut du = vec![0.0; length];
        for (row, dtarget) in batch.rows.iter().zip(dtargets.chunks_exact(width)) {
            cpu::add(&mut du[*row as usize * width..][..width], dtarget);
        }
        du
    }

    /// Through the gate, on `m` rows: gives the gradients of its weights and the output's, and that by `normed`.
    fn gated(&mut self, normed: &[f32], m: usize, tiles: Vec<Tile>, dy: Vec<f32>) -> Vec<f32> {
        let (pass, threads, mut kept) = (self.pass, &*self.pass.threads, tiles.into_iter());
        let (x, mut dnormed) = (inputs(threads, normed, m), vec![0.0; normed.len()]);
        let width = pass.shape.hidden_size as usize;
        // Cut up before there are gradients of weights, so that it goes as they grow.
        let parts: Vec<Vec<f32>> = pass.tiles().map(|some| columns(&dy, width, some)).collect();
        drop(dy);
        let [mut output, mut gate] = [(); 2].map(|()| Vec::with_capacity(width * pass.attention.width));
        let (bias, mut dbias) = (self.weights["gate.bias"].values.floats(), Vec::new());
        for (some, dy) in pass.tiles().zip(parts) {
            let Tile { z, delta } = kept.next().unwrap_or_else(|| pass.tile(self.weights, &some, normed));
            let by = gated_backward(threads, &z, &bias[some.clone()], &delta, &dy);
            drop((z, delta, dy));
            let GateGradients { z: dz, bias: of_bias, delta: ddelta } = by;
            dbias.extend(of_bias);
            for (name, dy, total) in [("output.weight", ddelta, &mut output), ("gate.weight", dz, &mut gate)] {
                cpu::add(&mut dnormed, &Stack::part(&self.weights[name], some.clone()).backward(threads, &dy));
                total.extend(times(threads, &transpose(threads, &dy, m, some.len()), &x));
            }
        }
        drop((x, bias));
        self.give("gate.bias", dbias);
        self.give("output.weight", output);
        self.give("gate.weight", gate);
        dnormed
    }
}
