//! Moving averages of weights, see [`Backward::average`](crate::kernel::Backward::average).

use super::chunks::CHUNK;
use crate::kernel::Weight;
use crate::kernel::cpu::Threads;

pub fn average(threads: &Threads, average: &mut Weight, weight: &Weight, share: f32) {
    let mut work: Vec<&mut [f32]> = average.values.floats_mut().chunks_mut(CHUNK).collect();
    threads.for_each(&mut work, |chunk, average| {
        let mut weights = [0.0; CHUNK];
        let weights = &mut weights[..average.len()];
        weight.values.read(chunk * CHUNK, weights);
        average.iter_mut().zip(weights).for_each(|(average, weight)| *average += share * (*weight - *average));
    });
}
