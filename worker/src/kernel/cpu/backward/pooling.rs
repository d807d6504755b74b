//! Attention pooling of a classifier, there and back.

use crate::kernel::cpu;

/// Attention weights of one sequence's rows: the softmax of `pooling · row` over positions.
fn pooling_weights(rows: &[f32], pooling: &[f32]) -> Vec<f32> {
    let mut scores: Vec<f32> = rows.chunks_exact(pooling.len()).map(|row| cpu::dot(row, pooling)).collect();
    cpu::softmax_row(&mut scores);
    scores
}

/// Attention pooling: `[rows, w] → [sequences, w]`, `lengths` rows each.
pub fn pool(rows: &[f32], pooling: &[f32], lengths: &[usize]) -> Vec<f32> {
    let width = pooling.len();
    let mut out = vec![0.0; lengths.len() * width];
    let mut rest = rows;
    for (length, out) in lengths.iter().zip(out.chunks_exact_mut(width)) {
        let (sequence, after) = rest.split_at(length * width);
        rest = after;
        for (row, weight) in sequence.chunks_exact(width).zip(pooling_weights(sequence, pooling)) {
            out.iter_mut().zip(row).for_each(|(out, value)| *out += weight * value);
        }
    }
    out
}

/// With weights `p = softmax(s)`, `s = rows · pooling`: `dp = rows · dy`, `ds = p (dp - Σ p dp)`,
/// `drows = p dyᵀ + ds poolingᵀ`, `dpooling = Σ ds · rows`. `rows` are `[m, w]`, `lengths` of them a sequence, `dy` is `[sequences, w]`.
pub(super) fn pool_backward(rows: &[f32], pooling: &[f32], lengths: &[usize], dy: &[f32]) -> (Vec<f32>, Vec<f32>) {
    let width = pooling.len();
    let (mut drows, mut dpooling) = (vec![0.0; rows.len()], vec![0.0; width]);
    let (mut rest, mut drest) = (rows, &mut drows[..]);
    for (length, dy) in lengths.iter().zip(dy.chunks_exact(width)) {
        let (sequence, after) = rest.split_at(length * width);
        let (dsequence, dafter) = drest.split_at_mut(length * width);
        (rest, drest) = (after, dafter);
        let p = pooling_weights(sequence, pooling);
        let dp: Vec<f32> = sequence.chunks_exact(width).map(|row| cpu::dot(row, dy)).collect();
        let mean = cpu::dot(&p, &dp);
        for ((row, drow), (p, dp)) in sequence.chunks_exact(width).zip(dsequence.chunks_exact_mut(width)).zip(p.iter().zip(&dp)) {
            let ds = p * (dp - mean);
            for (index, drow) in drow.iter_mut().enumerate() {
                *drow = p * dy[index] + ds * pooling[index];
                dpooling[index] += ds * row[index];
            }
        }
    }
    (drows, dpooling)
}
