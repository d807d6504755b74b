//! The output and its gate, some columns of D at a time: what is as wide as the base's rows exists no more often than it must.

use std::ops::Range;

use carryon_crds::wire::memory::TILE;

use super::elementwise::{self, gated_backward};
use super::linear::{Stack, columns, columns_times, rows_across};
use crate::kernel::cpu::{self, Cpu};
use crate::kernel::{Gate, GateGradients};

/// Some columns of what the gate is computed from.
pub struct Tile {
    /// `G · x`.
    z: Vec<f32>,
    /// `O · x`.
    delta: Vec<f32>,
}

fn tiles(width: usize) -> impl Iterator<Item = Range<usize>> {
    (0..width).step_by(TILE).map(move |first| first..(first + TILE).min(width))
}

fn tile(cpu: &Cpu, gate: &Gate<'_, Cpu>, some: &Range<usize>, x: &[f32]) -> Tile {
    let product = |weight| Stack::part(weight, some.clone()).forward(cpu, x);
    Tile { z: product(gate.gate), delta: product(gate.output) }
}

/// `g ⊙ Δ` of rows, `[rows, D]`, and what the gate was computed from.
pub(super) fn forward(cpu: &Cpu, gate: &Gate<'_, Cpu>, x: &[f32], keep: bool) -> (Vec<f32>, Option<Vec<Tile>>) {
    let (width, bias) = (gate.bias.values.len(), gate.bias.values.floats());
    let mut out = vec![0.0; x.len() / gate.output.shape[1] * width];
    let mut kept = keep.then(Vec::new);
    for some in tiles(width) {
        let tile = tile(cpu, gate, &some, x);
        let gated = elementwise::gated(&cpu.threads, &tile.z, &bias[some.clone()], &tile.delta);
        for (row, gated) in out.chunks_exact_mut(width).zip(gated.chunks_exact(some.len())) {
            row[some.clone()].copy_from_slice(gated);
        }
        if let Some(kept) = &mut kept {
            kept.push(tile);
        }
    }
    (out, kept)
}

/// Through the gate: the gradients of its weights and the output's, and that by `x`.
pub(super) fn backward(cpu: &Cpu, gate: &Gate<'_, Cpu>, rows: &[f32], kept: Option<Vec<Tile>>, dy: Vec<f32>) -> GateGradients<Vec<f32>> {
    let (width, inner, threads) = (gate.bias.values.len(), gate.output.shape[1], &cpu.threads);
    let mut kept = kept.into_iter().flatten();
    let (x, mut dx) = (rows_across(threads, rows, inner, cpu.training), vec![0.0; rows.len()]);
    // Cut up before there are gradients of weights, so that it goes as they grow.
    let parts: Vec<Vec<f32>> = tiles(width).map(|some| columns(&dy, width, some)).collect();
    drop(dy);
    let [mut by_output, mut by_gate] = [(); 2].map(|()| Vec::with_capacity(width * inner));
    let (bias, mut by_bias) = (gate.bias.values.floats(), Vec::new());
    for (some, dy) in tiles(width).zip(parts) {
        let Tile { z, delta } = kept.next().unwrap_or_else(|| tile(cpu, gate, &some, rows));
        let by = gated_backward(threads, &z, &bias[some.clone()], &delta, &dy);
        drop((z, delta, dy));
        let elementwise::Gradients { z: dz, bias: of_bias, delta: ddelta } = by;
        by_bias.extend(of_bias);
        for (weight, dy, total) in [(gate.output, ddelta, &mut by_output), (gate.gate, dz, &mut by_gate)] {
            cpu::add(&mut dx, &Stack::part(weight, some.clone()).backward(cpu, &dy));
            total.extend(columns_times(threads, &dy, some.len(), 0..some.len(), &x));
        }
    }
    GateGradients { x: dx, output: by_output, gate: by_gate, bias: by_bias }
}
