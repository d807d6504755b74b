//! The loss of rewards: of two texts, the one that people chose is to score higher.

use super::sets::softplus;
use super::{Loss, Measured};
use crate::train::error::TrainError;
use crate::train::states::MicroBatch;

/// R. Bradley and M. Terry's model (1952), as TRL's RewardTrainer has it: `-ln σ(chosen - rejected)`. Scores come in pairs, the chosen text's first.
pub struct PairLoss;

impl Loss for PairLoss {
    fn measure(&mut self, batch: &MicroBatch, output: Option<Vec<f32>>, gradient: bool) -> Result<Option<Measured>, TrainError> {
        let output = output.as_deref();
        let nothing = vec![0.0; if output.is_none() { 2 * batch.targets.len() } else { 0 }];
        let mut measured = Measured::default();
        for [chosen, rejected] in output.unwrap_or(&nothing).as_chunks::<2>().0 {
            let margin = f64::from(*chosen) - f64::from(*rejected);
            measured.loss.push(softplus(-margin) as f32);
            if gradient {
                let slope = 1.0 / (1.0 + margin.exp());
                measured.gradient.extend([-slope as f32, slope as f32]);
            }
        }
        Ok(Some(measured))
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{batch, close};
    use super::*;
    use crate::train::states::Wanted;

    /// `-torch.nn.functional.logsigmoid(torch.tensor([1., -3., 0.]) - torch.tensor([-.5, 60., 0.]))` and its gradient.
    #[test]
    fn pair_loss_follows_pytorch() {
        let measured = PairLoss.measure(&batch(Wanted::Groups(3)), Some(vec![1.0, -0.5, -3.0, 60.0, 0.0, 0.0]), true).unwrap().unwrap();
        close(&measured.loss, &[0.201_413_28, 63.0, std::f32::consts::LN_2]);
        close(&measured.gradient, &[-0.182_425_52, 0.182_425_52, -1.0, 1.0, -0.5, 0.5]);
    }
}
