//! AdamW, see [`Rule::AdamW`].

use std::sync::Arc;

use super::WEIGHT;
use super::chunks::{CHUNK, chunks, moment_chunks};
use crate::kernel::cpu::{Cpu, Threads};
use crate::kernel::moment::Dice;
use crate::kernel::{Change, Rule, Step};

pub fn adamw(threads: &Threads, step: &Step, change: &mut Change<'_, Cpu>) {
    let Change { name, weight, gradient, states } = change;
    let [first, second] = &mut states[..] else { unreachable!("AdamW remembers two moments") };
    let [take, take_squared] = Rule::BETAS.map(|beta| (1.0 - beta) as f32);
    let keep_squared = Rule::BETAS[1] as f32;
    let (keep, [size, root]) = (step.keep(), step.adamw_size());
    let update = |values: &mut [f32], gradient: &[f32], m: &mut [f32], v: &mut [f32]| {
        for ((value, gradient), (m, v)) in values.iter_mut().zip(gradient).zip(m.iter_mut().zip(v)) {
            *m += take * (gradient - *m);
            *v = keep_squared * *v + take_squared * gradient * gradient;
            *value = keep * *value - size * *m / (v.sqrt() / root + Rule::EPSILON as f32);
        }
    };
    let moments = moment_chunks(Arc::make_mut(first)).into_iter().zip(moment_chunks(Arc::make_mut(second)));
    let mut work: Vec<_> = chunks(&mut weight.values).into_iter().zip(gradient.values.chunks(CHUNK)).zip(moments).collect();
    let dice = [0, 1, WEIGHT].map(|which| Dice::new(step.seed, step.number, name, which));
    threads.for_each(&mut work, |chunk, ((values, gradient), (m, v))| {
        let place = chunk * CHUNK;
        values.with(dice[2], place, |values| m.with(dice[0], place, |m| v.with(dice[1], place, |v| update(values, gradient, m, v))));
    });
}
