//! The loss of heads that put out a number.

use super::{Loss, Measured};
use crate::head::Weights;
use crate::train::error::TrainError;
use crate::train::states::{MicroBatch, Wanted};

/// Squared error in units of the labels' standard deviation, as PyTorch's `MSELoss` has it: 1 is what their mean alone would get, whatever they measure.
pub struct ValueLoss {
    /// Mean and standard deviation of the training labels.
    pub scale: (f64, f64),
}

impl Loss for ValueLoss {
    fn measure(&mut self, batch: &MicroBatch, output: Option<Vec<f32>>, gradient: bool) -> Result<Option<Measured>, TrainError> {
        let output = output.as_deref();
        let Wanted::Values(values) = &batch.targets else { return Ok(Some(Measured::default())) };
        let (mean, deviation) = self.scale;
        let mut measured = Measured::default();
        for (index, value) in values.iter().enumerate() {
            let error = f64::from(output.map_or(0.0, |output| output[index])) - (value - mean) / deviation;
            measured.loss.push((error * error) as f32);
            if gradient {
                measured.gradient.push((2.0 * error) as f32);
            }
        }
        Ok(Some(measured))
    }
}

/// Makes a head that puts out standard deviations from the mean put out the number itself.
pub fn unscale(weights: &mut Weights, (mean, deviation): (f64, f64)) {
    for (name, offset) in [("classifier.weight", 0.0), ("classifier.bias", mean)] {
        if let Some(weight) = weights.get_mut(name) {
            weight.values.floats_mut().iter_mut().for_each(|value| *value = (f64::from(*value) * deviation + offset) as f32);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{batch, close};
    use super::*;
    use crate::head::Weight;

    #[test]
    fn errors_are_measured_in_standard_deviations() {
        let batch = batch(Wanted::Values(vec![5.0, 2.0]));
        let mut loss = ValueLoss { scale: (3.0, 2.0) };
        let measured = loss.measure(&batch, Some(vec![0.5, 0.5]), true).unwrap().unwrap();
        close(&measured.loss, &[0.25, 1.0]);
        close(&measured.gradient, &[-1.0, 2.0]);
        close(&loss.measure(&batch, None, false).unwrap().unwrap().loss, &[1.0, 0.25]);
    }

    #[test]
    fn the_head_that_is_written_puts_out_the_number_itself() {
        let tensor = |name: &str, values: Vec<f32>| (name.to_owned(), Weight::new(vec![values.len()], values));
        let mut weights = Weights::from([tensor("classifier.weight", vec![1.0, -0.5]), tensor("classifier.bias", vec![0.25])]);
        unscale(&mut weights, (3.0, 2.0));
        assert_eq!(weights["classifier.weight"].values.floats(), &[2.0, -1.0][..]);
        assert_eq!(weights["classifier.bias"].values.floats(), &[3.5][..]);
    }
}
