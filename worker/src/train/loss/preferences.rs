//! The loss of preferences: of two answers, the one that people chose is to become likelier than the other, beside the base.

use super::sets::softplus;
use super::{Loss, Measured};
use crate::train::error::TrainError;
use crate::train::states::{MicroBatch, Wanted};

/// Direct preference optimization (R. Rafailov et al., arXiv 2305.18290, equation 7), as TRL's DPOTrainer has it: `-ln σ(chosen - rejected)` of rewards
/// `β (ln p - ln p₀)`, with p an answer's probability and p₀ the base's. Answers come in pairs, the chosen one first.
pub struct PreferenceLoss {
    /// `-ln p` of each token.
    pub tokens: Box<dyn Loss>,
    /// β: how closely the head is held to the base.
    pub beta: f64,
}

impl PreferenceLoss {
    /// TRL's.
    pub const BETA: f64 = 0.1;
}

impl Loss for PreferenceLoss {
    fn measure(&mut self, batch: &MicroBatch, output: Option<Vec<f32>>, gradient: bool) -> Result<Option<Measured>, TrainError> {
        // Text that is no answer is measured token by token.
        let Wanted::Answers { lengths, .. } = &batch.targets else { return self.tokens.measure(batch, output, gradient) };
        if output.is_none() {
            return Ok(Some(Measured { loss: vec![std::f32::consts::LN_2; batch.targets.len()], ..Measured::default() }));
        }
        let Some(base) = self.tokens.measure(batch, None, false)? else { return Ok(None) };
        let Some(mut measured) = self.tokens.measure(batch, output, gradient)? else { return Ok(None) };
        let mut gains = base.loss.iter().zip(&measured.loss).map(|(base, head)| f64::from(*base) - f64::from(*head));
        let rewards: Vec<f64> = lengths.iter().map(|length| self.beta * gains.by_ref().take(*length).sum::<f64>()).collect();
        let (mut by_token, mut loss) = (measured.gradient.chunks_exact_mut(batch.hidden_size), Vec::new());
        for ([chosen, rejected], lengths) in rewards.as_chunks::<2>().0.iter().zip(lengths.as_chunks::<2>().0) {
            let margin = chosen - rejected;
            loss.push(softplus(-margin) as f32);
            let slope = (self.beta / (1.0 + margin.exp())) as f32;
            for (length, slope) in lengths.iter().zip([slope, -slope]) {
                by_token.by_ref().take(*length).flatten().for_each(|gradient| *gradient *= slope);
            }
        }
        Ok(Some(Measured { loss, rewards: rewards.into_iter().map(|reward| reward as f32).collect(), ..measured }))
    }

    fn set_alpha(&mut self, alpha: f64) {
        self.tokens.set_alpha(alpha);
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{batch, close};
    use super::*;

    /// Tokens whose loss is 2 minus the output; of the base, 2.
    struct Known;

    impl Loss for Known {
        fn measure(&mut self, batch: &MicroBatch, output: Option<Vec<f32>>, gradient: bool) -> Result<Option<Measured>, TrainError> {
            let count = batch.targets.indices().len();
            let loss = output.unwrap_or_else(|| vec![0.0; count]).iter().map(|output| 2.0 - output).collect();
            Ok(Some(Measured { loss, gradient: vec![-1.0; if gradient { count } else { 0 }], ..Measured::default() }))
        }
    }

    fn pairs() -> MicroBatch {
        batch(Wanted::Answers { tokens: vec![7; 6], lengths: vec![2, 1, 1, 2] })
    }

    /// With `head = [[.5, 1.], [-2.], [3.], [.25, .25]]` and `gain = lambda answer: .1 * sum(answer)`:
    /// `-F.logsigmoid(gain(chosen) - gain(rejected))` of both pairs, and its gradient by each token.
    #[test]
    fn preference_loss_follows_pytorch() {
        let mut loss = PreferenceLoss { tokens: Box::new(Known), beta: 0.1 };
        let measured = loss.measure(&pairs(), Some(vec![0.5, 1.0, -2.0, 3.0, 0.25, 0.25]), true).unwrap().unwrap();
        close(&measured.loss, &[0.533_382_5, 0.575_939_4]);
        let [first, second] = [0.041_338_24, 0.043_782_35];
        close(&measured.gradient, &[-first, -first, first, -second, second, second]);
        close(&measured.rewards, &[0.15, -0.2, 0.3, 0.05]);
    }

    #[test]
    fn the_base_prefers_nothing_to_itself() {
        let mut loss = PreferenceLoss { tokens: Box::new(Known), beta: 0.1 };
        let base = loss.measure(&pairs(), None, false).unwrap().unwrap();
        let untrained = loss.measure(&pairs(), Some(vec![0.0; 6]), false).unwrap().unwrap();
        assert_eq!(base.loss, untrained.loss);
        assert!(base.rewards.is_empty() && untrained.rewards == [0.0; 4]);
    }
}
