//! Operations on rows of f32: each result depends on its row alone, in a fixed order.

use super::isa::vectorised;

/// Partial sums of a reduction: value i goes to sum i mod 16, whatever the instructions.
const LANES: usize = 16;

/// e^x within 2 units in the last place; 0 below -87.3, infinite above 88.8, NaN for NaN.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    // 1.5 · 2^23: adding it rounds to an integer and leaves that in the low bits.
    const ROUND: f32 = 12_582_912.0;
    let clamped = x.clamp(-87.3, 88.8);
    let shifted = clamped.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    // x - n·ln 2, with ln 2 in two parts so that the difference keeps its bits; then the polynomial of Cephes' expf.
    let r = n.mul_add(2.121_944_4e-4, n.mul_add(-0.693_359_4, clamped));
    let mut p = 1.987_569_1e-4f32;
    for coefficient in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 5e-1] {
        p = p.mul_add(r, coefficient);
    }
    let mantissa = p.mul_add(r * r, r) + 1.0;
    // 2^n as two factors, since 2^128 is no f32.
    let exponent = shifted.to_bits().wrapping_sub(ROUND.to_bits()) as i32;
    let half = exponent >> 1;
    let power = |exponent: i32| f32::from_bits((exponent.wrapping_add(127) as u32) << 23);
    let result = mantissa * power(half) * power(exponent.wrapping_sub(half));
    if x < -87.3 { 0.0 } else { result }
}

/// Folds a row into 16 running values (lane = index mod 16), then those into one, pairwise.
#[inline(always)]
pub fn reduce(row: &[f32], start: f32, mut step: impl FnMut(usize, f32, f32) -> f32, join: impl Fn(f32, f32) -> f32) -> f32 {
    let mut lanes = [start; LANES];
    let blocks = row.chunks_exact(LANES);
    let (rest, offset) = (blocks.remainder(), row.len() - row.len() % LANES);
    for (block, values) in blocks.enumerate() {
        for lane in 0..LANES {
            lanes[lane] = step(block * LANES + lane, lanes[lane], values[lane]);
        }
    }
    for (lane, value) in rest.iter().enumerate() {
        lanes[lane] = step(offset + lane, lanes[lane], *value);
    }
    let mut width = LANES;
    while width > 1 {
        width /= 2;
        for lane in 0..width {
            lanes[lane] = join(lanes[lane], lanes[lane + width]);
        }
    }
    lanes[0]
}

vectorised! {
    /// Σ aᵢ·bᵢ over two rows of equal length.
    pub fn dot(a: &[f32], b: &[f32]) -> f32 {
        let b = &b[..a.len()];
        reduce(a, 0.0, |index, sum, value| value.mul_add(b[index], sum), |x, y| x + y)
    }
}

vectorised! {
    /// `target += addend`, element by element.
    pub fn add(target: &mut [f32], addend: &[f32]) {
        for (value, addend) in target.iter_mut().zip(addend) {
            *value += addend;
        }
    }
}

vectorised! {
    /// `target += factor · addend`, element by element.
    pub(super) fn add_multiple(target: &mut [f32], addend: &[f32], factor: f32) {
        for (value, addend) in target.iter_mut().zip(addend) {
            *value = addend.mul_add(factor, *value);
        }
    }
}

/// `1 / sqrt(mean(x²) + ε)`.
#[inline(always)]
fn inverse_rms(x: &[f32], epsilon: f32) -> f32 {
    let squares = reduce(x, 0.0, |_, sum, value| value.mul_add(value, sum), |a, b| a + b);
    1.0 / (squares / x.len() as f32 + epsilon).sqrt()
}

vectorised! {
    /// `out = x / sqrt(mean(x²) + ε) · weight` for one row; an empty weight counts as ones.
    pub(super) fn normalise(x: &[f32], weight: &[f32], epsilon: f32, out: &mut [f32]) {
        let scale = inverse_rms(x, epsilon);
        if weight.is_empty() {
            for (out, value) in out.iter_mut().zip(x) {
                *out = value * scale;
            }
        } else {
            for ((out, value), weight) in out.iter_mut().zip(x).zip(weight) {
                *out = value * scale * weight;
            }
        }
    }
}

vectorised! {
    /// RMSNorm of one row in place.
    pub(super) fn normalise_in_place(row: &mut [f32], weight: &[f32], epsilon: f32) {
        let scale = inverse_rms(row, epsilon);
        for (value, weight) in row.iter_mut().zip(weight) {
            *value = *value * scale * weight;
        }
    }
}

vectorised! {
    /// `target += norm(x) · weight` for one row.
    pub(super) fn add_normalised(target: &mut [f32], x: &[f32], weight: &[f32], epsilon: f32) {
        let scale = inverse_rms(x, epsilon);
        for ((target, value), weight) in target.iter_mut().zip(x).zip(weight) {
            *target += value * scale * weight;
        }
    }
}

vectorised! {
    /// `cap · tanh(x / cap)` of every value; NaN stays NaN.
    pub(super) fn softcap(row: &mut [f32], cap: f32) {
        for value in row {
            *value = cap * (1.0 - 2.0 / (1.0 + exp(2.0 / cap * *value)));
        }
    }
}

/// RMSNorm of rows as long as `weight`: `out = x / sqrt(mean(x²) + ε) · weight`.
pub fn rms_norm(x: &[f32], weight: &[f32], epsilon: f32, out: &mut [f32]) {
    for (x, out) in x.chunks_exact(weight.len()).zip(out.chunks_exact_mut(weight.len())) {
        normalise(x, weight, epsilon, out);
    }
}

/// x · sigmoid(x).
#[inline(always)]
pub(super) fn silu(x: f32) -> f32 {
    x / (1.0 + exp(-x))
}

/// x/2 · (1 + tanh(√(2/π) · (x + 0.044715 x³))), which is x · sigmoid of twice the bracket.
#[inline(always)]
pub(super) fn gelu_tanh(x: f32) -> f32 {
    const TWICE: f32 = 1.595_769;
    x / (1.0 + exp(-TWICE * (0.044_715 * x * x).mul_add(x, x)))
}

vectorised! {
    /// `out = silu(gate) · up`, element by element.
    pub fn silu_mul(gate: &[f32], up: &[f32], out: &mut [f32]) {
        for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
            *out = silu(*gate) * up;
        }
    }
}

vectorised! {
    /// Replaces a row of scores by e^(score - maximum), the softmax times their sum; returns maximum and sum.
    pub(super) fn exponentials(row: &mut [f32]) -> (f32, f32) {
        let maximum = reduce(row, f32::NEG_INFINITY, |_, a, b| if b > a || b.is_nan() { b } else { a }, |a, b| if b > a || b.is_nan() { b } else { a });
        for value in row.iter_mut() {
            *value = exp(*value - maximum);
        }
        (maximum, reduce(row, 0.0, |_, sum, value| sum + value, |a, b| a + b))
    }
}

vectorised! {
    /// Multiplies a row by `factor`.
    pub(super) fn scale(row: &mut [f32], factor: f32) {
        for value in row {
            *value *= factor;
        }
    }
}

/// Softmax of one row, in place; returns the logarithm of the sum of the exponentials of what the row held.
pub fn softmax_row(row: &mut [f32]) -> f32 {
    let (maximum, sum) = exponentials(row);
    scale(row, 1.0 / sum);
    maximum + sum.ln()
}

vectorised! {
    /// Rotates the first values of every head of one row in place, two for each angle: value i of their first half pairs with value i of their second.
    pub fn rope(row: &mut [f32], head_dim: usize, cosine: &[f32], sine: &[f32]) {
        let half = cosine.len();
        let sine = &sine[..half];
        for head in row.chunks_exact_mut(head_dim) {
            let (low, high) = head[..2 * half].split_at_mut(half);
            for i in 0..half {
                let (a, b) = (low[i], high[i]);
                low[i] = a * cosine[i] - b * sine[i];
                high[i] = b * cosine[i] + a * sine[i];
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_units() {
        for i in -9000..9000 {
            let x = i as f32 / 101.3;
            let (ours, exact) = (exp(x), f64::from(x).exp());
            if (-87.0..88.0).contains(&x) {
                assert!((f64::from(ours) / exact - 1.0).abs() < 2.4e-7, "{x}: {ours} {exact}");
            }
        }
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(f32::INFINITY), f32::INFINITY);
        assert_eq!(exp(0.0), 1.0);
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn softmax_sums_to_one_and_shows_nan() {
        let mut row: Vec<f32> = (0..77).map(|i| (i % 13) as f32 - 3.0).collect();
        softmax_row(&mut row);
        assert!((row.iter().sum::<f32>() - 1.0).abs() < 1e-6);
        row[40] = f32::NAN;
        softmax_row(&mut row);
        assert!(row.iter().all(|value| value.is_nan()));
    }

    #[test]
    fn norm_dot_and_rope_follow_their_formulas() {
        let x: Vec<f32> = (0..37).map(|i| (i as f32 - 11.0) / 7.0).collect();
        let weight = vec![1.5; 37];
        let mut out = vec![0.0; 37];
        rms_norm(&x, &weight, 1e-5, &mut out);
        let mean = x.iter().map(|v| f64::from(v * v)).sum::<f64>() / 37.0;
        for (out, x) in out.iter().zip(&x) {
            assert!((f64::from(*out) - f64::from(*x) * 1.5 / (mean + 1e-5).sqrt()).abs() < 1e-6);
        }
        assert!((f64::from(dot(&x, &x)) - mean * 37.0).abs() < 1e-4);

        let rotation = crate::kernel::Rotation::new(1e4, 4);
        let (mut cosine, mut sine) = ([0.0; 2], [0.0; 2]);
        rotation.at(3, &mut cosine, &mut sine);
        let mut head = [1.0, 2.0, 3.0, 4.0];
        rope(&mut head, 4, &cosine, &sine);
        let (s, c) = 3f32.sin_cos();
        assert!((head[0] - (c - 3.0 * s)).abs() < 1e-6 && (head[2] - (3.0 * c + s)).abs() < 1e-6);
    }
}
