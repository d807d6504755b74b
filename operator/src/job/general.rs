//! What a head costs on text that has nothing to do with what it learns: an alarm beside the job.

use carryon_crds::CarryOnJob;
use carryon_crds::condition::Verdict;
use carryon_crds::condition::types::GENERAL_TEXT_KEPT;
use carryon_crds::job::ProgressStatus;

/// Whether the last evaluation's loss of general text is within what the job allows; none where it allows anything, or before it was measured.
pub fn verdict(job: &CarryOnJob, progress: Option<&ProgressStatus>) -> Option<Verdict> {
    let bound = job.spec.evaluation.max_general_loss_increase?;
    let figure = |text: &Option<String>| text.as_ref()?.parse::<f64>().ok();
    let (head, base) = (figure(&progress?.general_loss)?, figure(&progress?.base_general_loss)?);
    let found = format!("the loss of data.split.general is {:.4} nats above the base's", head - base);
    Some(match head - base > bound {
        true => Verdict::no(GENERAL_TEXT_KEPT, "Forgetting", format!("{found}, more than evaluation.maxGeneralLossIncrease: {bound}")),
        false => Verdict::yes(GENERAL_TEXT_KEPT, "Kept", found),
    })
}
