//! Rows of logits as the host sees them, against sums in f64 over all of them.

use carryon_worker::kernel::{Backend, LOGIT_BLOCK};

use super::common::engine::{candle, cpu};
use super::fixtures::assert_close;

const ROWS: usize = 3;
/// Two blocks and five logits.
const V: usize = 2 * LOGIT_BLOCK + 5;

fn logits(row: usize) -> Vec<f32> {
    (0..V as u32).map(|token| ((token * 37 + row as u32 * 11) % 101) as f32 / 9.0 - 5.0).collect()
}

fn shows_what_is_there<B: Backend>(backend: &B) {
    let rows = backend.write(&(0..ROWS).flat_map(logits).collect::<Vec<_>>(), V).unwrap();
    let looks = [(2, 0.7), (0, 1.0), (2, 1.0), (1, 1e-30)];
    let found = backend.outline(&rows, &looks).unwrap();
    let (mut maxima, mut weights) = (Vec::new(), Vec::new());
    for (row, temperature) in looks {
        let logits = logits(row as usize);
        let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let weight = |logit: &f32| (f64::from(logit - largest) / f64::from(temperature)).exp();
        maxima.extend(logits.chunks(LOGIT_BLOCK).map(|block| block.iter().copied().fold(f32::NEG_INFINITY, f32::max)));
        weights.extend(logits.chunks(LOGIT_BLOCK).map(|block| block.iter().map(weight).sum::<f64>() as f32));
    }
    assert_eq!(found.maxima, maxima);
    assert_close("weights", &found.weights, &weights, 1e-6);

    let blocks = backend.blocks(&rows, &[(1, 2), (0, 0), (2, 1)]).unwrap();
    let block = |row: usize, block: usize| logits(row).chunks(LOGIT_BLOCK).nth(block).unwrap().to_vec();
    let mut expected = block(1, 2);
    expected.resize(LOGIT_BLOCK, f32::NEG_INFINITY);
    assert_eq!(blocks, [expected, block(0, 0), block(2, 1)].concat());
}

#[test]
fn the_host_sees_blocks_as_they_are() {
    shows_what_is_there(&cpu(2));
    shows_what_is_there(&candle());
}
