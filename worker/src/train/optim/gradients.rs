//! Gradients as a whole: adding, scaling, clipping. Sums run in the order of names, so they have equal bits in every run.

use crate::head::Gradients;
use crate::kernel::{Backward, Result};

/// Adds `more` to what `total` has under `name`, if anything.
///
/// # Errors
/// The device failed.
pub fn accumulate<B: Backward>(backend: &B, total: &mut Gradients<B>, name: &str, more: B::Rows) -> Result<()> {
    match total.get_mut(name) {
        Some(total) => backend.add(total, &more)?,
        None => drop(total.insert(name.to_owned(), more)),
    }
    Ok(())
}

/// Multiplies every gradient by `factor`.
///
/// # Errors
/// The device failed.
pub fn scale<B: Backward>(backend: &B, gradients: &mut Gradients<B>, factor: f32) -> Result<()> {
    gradients.values_mut().try_for_each(|gradient| backend.scale(gradient, factor))
}

/// What brings a gradient of this norm down to `most`, as `torch.nn.utils.clip_grad_norm_`: 1 where it is below; a `most` of 0 means no bound.
pub fn shrink(norm: f64, most: f64) -> f32 {
    let factor = most / (norm + 1e-6);
    if most > 0.0 && factor < 1.0 { factor as f32 } else { 1.0 }
}

/// Scales all gradients down to a global L2 norm of `most`; 0 means no bound. Gives the norm before, NaN included.
///
/// # Errors
/// The device failed.
pub fn clip_norm<B: Backward>(backend: &B, gradients: &mut Gradients<B>, most: f64) -> Result<f64> {
    let norm = backend.length(gradients.values())?;
    match shrink(norm, most) {
        1.0 => {}
        factor => scale(backend, gradients, factor)?,
    }
    Ok(norm)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::{Backend as _, Cpu, Threads};

    fn gradients(cpu: &Cpu) -> Gradients<Cpu> {
        let row = |values: &[f32]| cpu.write(values, values.len()).unwrap();
        [("a".to_owned(), row(&[3.0, 0.0])), ("b".to_owned(), row(&[-4.0]))].into()
    }

    fn values(cpu: &Cpu, gradients: &Gradients<Cpu>) -> Vec<f32> {
        gradients.values().flat_map(|gradient| cpu.read(gradient).unwrap().into_owned()).collect()
    }

    #[test]
    fn clips_the_norm_over_all_tensors() {
        let cpu = Cpu::new(Threads::new(1));
        let mut clipped = gradients(&cpu);
        assert_eq!(clip_norm(&cpu, &mut clipped, 1.0).unwrap(), 5.0);
        let clipped = values(&cpu, &clipped);
        assert!((clipped[0] - 0.6).abs() < 1e-6 && (clipped[2] + 0.8).abs() < 1e-6);
        let mut kept = gradients(&cpu);
        clip_norm(&cpu, &mut kept, 6.0).unwrap();
        assert_eq!(values(&cpu, &kept), [3.0, 0.0, -4.0]);
    }

    #[test]
    fn accumulates_by_name() {
        let cpu = Cpu::new(Threads::new(1));
        let mut total = Gradients::<Cpu>::new();
        for (name, gradient) in gradients(&cpu).into_iter().chain(gradients(&cpu)) {
            accumulate(&cpu, &mut total, &name, gradient).unwrap();
        }
        assert_eq!(values(&cpu, &total), [6.0, 0.0, -8.0]);
    }
}
