//! What is asked of rows of logits: rows × V each.

use candle_core::{D, DType, Tensor};
use candle_nn::ops::log_softmax;

use super::product::multiply;
use super::{Candle, CandleDevice, Matrix, Rows, capped, indices};
use crate::kernel::cpu::inverse;
use crate::kernel::{Aim, LOGIT_BLOCK, Outline};

/// See [`crate::kernel::Backend::greedy`].
pub fn greedy(logits: &Tensor) -> Candle<Vec<Option<u32>>> {
    // Zero, or NaN where a logit is not finite.
    let nothing = (logits * 0.0)?.sum(D::Minus1)?.to_vec1::<f32>()?;
    let likeliest = logits.argmax(D::Minus1)?.to_vec1::<u32>()?;
    Ok(likeliest.into_iter().zip(nothing).map(|(token, nothing)| (nothing == 0.0).then_some(token)).collect())
}

/// See [`crate::kernel::Backend::outline`].
pub fn outline(logits: &Tensor, looks: &[(u32, f32)]) -> Candle<Outline> {
    let (rows, temperatures): (Vec<u32>, Vec<f32>) = looks.iter().map(|(row, temperature)| (row, inverse(*temperature))).unzip();
    let logits = logits.index_select(&indices(&rows, logits.device())?, 0)?;
    let temperatures = Tensor::from_slice(&temperatures, (looks.len(), 1, 1), logits.device())?;
    let maxima = in_blocks(&logits)?.max(D::Minus1)?;
    let largest = maxima.max_keepdim(D::Minus1)?.unsqueeze(2)?;
    let weights = in_blocks(&logits)?.broadcast_sub(&largest)?.broadcast_mul(&temperatures)?.exp()?.sum(D::Minus1)?;
    Ok(Outline { maxima: maxima.flatten_all()?.to_vec1()?, weights: weights.flatten_all()?.to_vec1()? })
}

/// See [`crate::kernel::Backend::blocks`].
pub fn blocks(logits: &Tensor, which: &[(u32, u32)]) -> Candle<Vec<f32>> {
    let blocks = in_blocks(logits)?;
    let count = blocks.dims()[1] as u32;
    let which: Vec<u32> = which.iter().map(|(row, block)| row * count + block).collect();
    blocks.flatten(0, 1)?.index_select(&indices(&which, logits.device())?, 0)?.flatten_all()?.to_vec1()
}

/// See [`crate::kernel::Backend::losses`].
pub fn losses(
    y: &Tensor,
    lm_head: &Matrix,
    backward: Option<&Matrix>,
    aim: &Aim<'_, CandleDevice>,
    softcap: Option<f32>,
) -> Candle<(Vec<f32>, Option<Rows>)> {
    let widened = lm_head.widened()?;
    let logits_of = |rows: &Tensor| {
        let plain = multiply(rows, &widened)?;
        softcap.map_or_else(|| Ok(plain.clone()), |cap| capped(&plain, cap))
    };
    let logits = logits_of(y)?;
    let logarithms = log_softmax(&logits, D::Minus1)?;
    let (loss, off) = match aim {
        Aim::Tokens(targets) => {
            let target = indices(targets, y.device())?.unsqueeze(1)?;
            let ones = Tensor::ones(target.shape(), DType::F32, y.device())?;
            (logarithms.gather(&target, 1)?.neg()?, logarithms.exp()?.scatter_add(&target, &ones.neg()?, 1)?)
        }
        Aim::Rows(others) => {
            let others = log_softmax(&logits_of(others.tensor()?)?, D::Minus1)?;
            let likely = others.exp()?;
            ((&likely * (others - &logarithms)?)?.sum_keepdim(D::Minus1)?, (logarithms.exp()? - likely)?)
        }
    };
    let loss = loss.squeeze(1)?.to_vec1()?;
    let Some(backward) = backward else { return Ok((loss, None)) };
    let off = match softcap {
        Some(cap) => (off * (logits / f64::from(cap))?.sqr()?.affine(-1.0, 1.0)?)?,
        None => off,
    };
    Ok((loss, Some(multiply(&off, &backward.widened()?)?.into())))
}

/// Rows × V logits as rows × blocks × [`LOGIT_BLOCK`], the last block filled up with -∞.
fn in_blocks(logits: &Tensor) -> Candle<Tensor> {
    let (rows, vocabulary) = logits.dims2()?;
    let blocks = vocabulary.div_ceil(LOGIT_BLOCK);
    let missing = blocks * LOGIT_BLOCK - vocabulary;
    let whole = match missing {
        0 => logits.clone(),
        _ => Tensor::cat(&[logits, &Tensor::full(f32::NEG_INFINITY, (rows, missing), logits.device())?], 1)?,
    };
    whole.reshape((rows, blocks, LOGIT_BLOCK))
}
