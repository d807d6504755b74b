//! Steps of optimizers, one weight after the other.
//!
//! Numbers that are rounded by chance go through the host: chance is a function of 64-bit integers, which candle's operations do not have, and must be
//! the same on every device.

use candle_core::{DType, Tensor};
use half::bf16;

use super::super::{Candle, CandleDevice};
use crate::kernel::moment::{Dice, WEIGHT};
use crate::kernel::{Change, Rule, Step};

/// See [`crate::kernel::Backward::update`].
pub fn update(step: &Step, change: &mut Change<'_, CandleDevice>) -> Candle<()> {
    let dice = |which| Dice::new(step.seed, step.number, change.name, which);
    let gradient = std::mem::take(&mut change.gradient).tensor()?.flatten_all()?;
    let value = (change.weight.flatten_all()?.to_dtype(DType::F32)? * f64::from(step.keep()))?;
    let value = match (step.rule, &mut change.states[..]) {
        (Rule::AdamW, [first, second]) => {
            let [take, take_squared] = Rule::BETAS.map(|beta| f64::from((1.0 - beta) as f32));
            let [size, root] = step.adamw_size().map(f64::from);
            let m = first.values()?;
            let m = (&m + ((&gradient - &m)? * take)?)?;
            let v = ((second.values()? * f64::from(Rule::BETAS[1] as f32))? + (gradient.sqr()? * take_squared)?)?;
            let moved = ((&m / ((v.sqrt()? / root)? + f64::from(Rule::EPSILON as f32))?)? * size)?;
            first.keep(m, dice(0))?;
            second.keep(v, dice(1))?;
            (value - moved)?
        }
        (Rule::Muon, [momentum]) => {
            let (rows, columns) = change.weight.dims2()?;
            let m = ((momentum.values()? * f64::from(Rule::MOMENTUM))? + &gradient)?;
            let ahead = (gradient + (&m * f64::from(Rule::MOMENTUM))?)?.reshape((rows, columns))?;
            momentum.keep(m, dice(0))?;
            let direction = orthogonal(ahead)?.flatten_all()?;
            (value - (direction * f64::from(step.muon_size(rows, columns)))?)?
        }
        (rule, states) => candle_core::bail!("{rule:?} does not remember {} moments", states.len()),
    };
    let value = if change.weight.dtype() == DType::BF16 { rounded(&value, dice(WEIGHT))? } else { value };
    *change.weight = value.reshape(change.weight.shape())?;
    Ok(())
}

/// Newton–Schulz iteration, on the wide one of a matrix and its transpose.
fn orthogonal(x: Tensor) -> Candle<Tensor> {
    let (rows, columns) = x.dims2()?;
    let norm = x.sqr()?.sum(1)?.to_dtype(DType::F64)?.sum_all()?.to_scalar::<f64>()?.sqrt() as f32;
    let across = rows > columns;
    let mut x = if across { x.t()?.contiguous()? } else { x };
    x = (x / f64::from(norm + 1e-7))?;
    let [a, b, c] = Rule::NEWTON_SCHULZ.map(f64::from);
    for _ in 0..Rule::NEWTON_SCHULZ_STEPS {
        let square = x.matmul(&x.t()?)?;
        let mixed = ((&square * b)? + (square.matmul(&square)? * c)?)?;
        x = ((&x * a)? + mixed.matmul(&x)?)?;
    }
    if across { x.t()?.contiguous() } else { Ok(x) }
}

/// These numbers as bf16, up or down by chance.
pub fn rounded(values: &Tensor, dice: Dice) -> Candle<Tensor> {
    let floats = values.flatten_all()?.to_vec1::<f32>()?;
    let mut halves = vec![bf16::ZERO; floats.len()];
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let share = floats.len().div_ceil(threads).max(1 << 14);
    std::thread::scope(|scope| {
        for (index, (halves, floats)) in halves.chunks_mut(share).zip(floats.chunks(share)).enumerate() {
            let round = move || {
                for (offset, (half, value)) in halves.iter_mut().zip(floats).enumerate() {
                    *half = dice.round(*value, index * share + offset);
                }
            };
            scope.spawn(round);
        }
    });
    Tensor::from_vec(halves, values.shape(), values.device())
}
