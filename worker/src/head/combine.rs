//! The one place where base and head meet.

use carryon_crds::pool::Dtype;

use crate::kernel::round_bf16;

/// `y = x̂ + α · (g ⊙ Δ)`, summed in f32 and rounded once to the pool's number type. With α = 0 the head is bypassed: `delta` is not read
/// (0 · NaN is NaN) and `y` has the bits of `x̂`, which is already rounded.
pub fn combine(x: &[f32], alpha: f64, delta: &[f32], dtype: Dtype) -> Vec<f32> {
    if alpha == 0.0 {
        return x.to_vec();
    }
    assert_eq!(x.len(), delta.len(), "rows of states and head");
    let alpha = alpha as f32;
    let mut y: Vec<f32> = x.iter().zip(delta).map(|(x, delta)| x + alpha * delta).collect();
    if dtype == Dtype::Bfloat16 {
        round_bf16(&mut y);
    }
    y
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zero_alpha_gives_the_bits_of_the_base() {
        let x = [1.0, -0.0, f32::MIN_POSITIVE];
        let y = combine(&x, 0.0, &[f32::NAN; 3], Dtype::Bfloat16);
        assert_eq!(y.map_bits(), x.to_vec().map_bits());
    }

    #[test]
    fn rounds_once_after_the_sum() {
        assert_eq!(combine(&[1.0], 0.5, &[0.007], Dtype::Bfloat16), [1.0]);
        assert_eq!(combine(&[1.0], 1.0, &[0.007], Dtype::Bfloat16), [1.007_812_5]);
        assert_eq!(combine(&[1.0], 0.5, &[0.007], Dtype::Float32), [1.0035]);
    }

    trait Bits {
        fn map_bits(&self) -> Vec<u32>;
    }

    impl Bits for Vec<f32> {
        fn map_bits(&self) -> Vec<u32> {
            self.iter().map(|value| value.to_bits()).collect()
        }
    }
}
