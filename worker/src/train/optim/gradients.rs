//! Gradients as a whole: adding, scaling, clipping. Sums run in the order of names, so they have equal bits in every run.

use crate::head::Gradients;
use crate::kernel::cpu;

/// Adds `more` to what `total` has under `name`, if anything.
pub fn accumulate(total: &mut Gradients, name: &str, more: Vec<f32>) {
    match total.get_mut(name) {
        Some(total) => cpu::add(total, &more),
        None => drop(total.insert(name.to_owned(), more)),
    }
}

/// Multiplies every gradient by `factor`.
pub fn scale(gradients: &mut Gradients, factor: f32) {
    gradients.values_mut().flatten().for_each(|gradient| *gradient *= factor);
}

/// L2 norm, NaN included.
pub fn norm<'a>(gradients: impl IntoIterator<Item = &'a f32>) -> f64 {
    gradients.into_iter().map(|gradient| f64::from(*gradient).powi(2)).sum::<f64>().sqrt()
}

/// What brings a gradient of this norm down to `most`, as `torch.nn.utils.clip_grad_norm_`: 1 where it is below; a `most` of 0 means no bound.
pub fn shrink(norm: f64, most: f64) -> f32 {
    let factor = most / (norm + 1e-6);
    if most > 0.0 && factor < 1.0 { factor as f32 } else { 1.0 }
}

/// Scales all gradients down to a global L2 norm of `most`; 0 means no bound. Gives the norm before, NaN included.
pub fn clip_norm(gradients: &mut Gradients, most: f64) -> f64 {
    let norm = norm(gradients.values().flatten());
    match shrink(norm, most) {
        1.0 => {}
        factor => scale(gradients, factor),
    }
    norm
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gradients() -> Gradients {
        [("a".to_owned(), vec![3.0, 0.0]), ("b".to_owned(), vec![-4.0])].into()
    }

    #[test]
    fn clips_the_norm_over_all_tensors() {
        let mut clipped = gradients();
        assert_eq!(clip_norm(&mut clipped, 1.0), 5.0);
        assert!((clipped["a"][0] - 0.6).abs() < 1e-6 && (clipped["b"][0] + 0.8).abs() < 1e-6);
        let mut kept = gradients();
        clip_norm(&mut kept, 6.0);
        assert_eq!(kept, gradients());
    }

    #[test]
    fn accumulates_by_name() {
        let mut total = Gradients::new();
        for (name, gradient) in gradients().into_iter().chain(gradients()) {
            accumulate(&mut total, &name, gradient);
        }
        assert_eq!(total["b"], [-8.0]);
    }
}
