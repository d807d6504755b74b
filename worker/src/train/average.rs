//! An exponential moving average of a head's weights, in f32 whatever they are trained in.

use std::sync::Arc;

use carryon_crds::pool::Dtype;

use crate::head::{Weight, Weights};
use crate::kernel::{Backward, DeviceError, Trained};

/// The average.
pub struct Average<B: Backward> {
    decay: f64,
    /// As it is now.
    pub weights: Arc<Trained<B>>,
}

impl<B: Backward> Average<B> {
    /// Goes on from `average`, or starts at `weights`.
    ///
    /// # Errors
    /// The device failed.
    pub fn new(backend: &B, decay: f64, average: Option<Arc<Weights>>, weights: &Weights) -> Result<Self, DeviceError> {
        let average = average.unwrap_or_else(|| Arc::new(floats(weights)));
        Ok(Self { decay, weights: backend.train(average)? })
    }

    /// Takes in `weights` behind step `number`, from 1.
    ///
    /// # Errors
    /// The device failed.
    pub fn take(&mut self, backend: &B, weights: &Trained<B>, number: u64) -> Result<(), DeviceError> {
        let share = (1.0 - kept(self.decay, number)) as f32;
        let averages = Arc::make_mut(&mut self.weights);
        weights.iter().try_for_each(|(name, weight)| match averages.get_mut(name) {
            Some(average) => backend.average(average, weight, share),
            None => Ok(()),
        })
    }
}

/// What is kept of the average behind step `number`: at first little, so that where training started is soon forgotten.
fn kept(decay: f64, number: u64) -> f64 {
    decay.min((1.0 + number as f64) / (10.0 + number as f64))
}

fn floats(weights: &Weights) -> Weights {
    let float = |weight: &Weight| Weight { shape: weight.shape.clone(), values: weight.values.clone().into_dtype(Dtype::Float32) };
    weights.iter().map(|(name, weight)| (name.clone(), float(weight))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_start_is_forgotten_before_the_average_is_long() {
        assert_eq!([1, 8, 100].map(|number| kept(0.9, number)), [2.0 / 11.0, 0.5, 0.9]);
    }
}
