//! How much of a trained head's output is added to the base's, chosen on held-out samples: `evaluation.alphas`.

use crate::kernel::{Backward, Trained};
use crate::train::checkpoint::Best;
use crate::train::error::TrainError;
use crate::train::fit::Run;
use crate::train::states::HiddenStates;

/// The best of `alphas`, as evaluations are compared, of the head with these weights; it counts so much from now on, and its figures are the run's best.
/// None without any. There must be held-out samples.
///
/// # Errors
/// States or losses that do not come; the wish to stop.
pub fn choose<S: HiddenStates, B: Backward>(run: &mut Run<S, B>, weights: &Trained<B>, alphas: &[f64]) -> Result<Option<f64>, TrainError> {
    let bound = run.when.max_general_loss_increase;
    let step = run.state.best.map_or(run.state.step, |best| best.step);
    let mut chosen: Option<(f64, Best)> = None;
    for &alpha in alphas {
        run.learner.loss.set_alpha(alpha);
        let now = run.judge(weights, step)?;
        let costs =
            now.general.map_or_else(String::new, |general| format!(", general text {:.4} (base {:.4})", general.head, general.base));
        run.console.note(&format!("alpha {alpha}: loss {:.4}{costs}", now.loss));
        if chosen.is_none_or(|(_, best)| now.is_better(&best, bound)) {
            chosen = Some((alpha, now));
        }
    }
    let Some((alpha, best)) = chosen else { return Ok(None) };
    run.learner.loss.set_alpha(alpha);
    run.state.best = Some(best);
    Ok(Some(alpha))
}
