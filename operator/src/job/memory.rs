//! What a job's trainer would take of memory, told before it starts.

use carryon_crds::condition::Verdict;
use carryon_crds::condition::types::MEMORY_PLANNED;
use carryon_crds::job::JobPool;
use carryon_crds::quantity::Bytes;
use carryon_crds::wire::memory::{Trainer, megabytes};
use carryon_crds::wire::{OtherBase, TapChoice};
use carryon_crds::{BaseModelPool, CarryOnJob};

use super::Observed;
use super::validate::loaded;

/// What a trainer has beside its head, at most: code, threads, the tokenizer of a large vocabulary.
const CONTEXT: u64 = 128_000_000;

/// What the head reads of the further pools, once all of them say what their models are.
fn others(job: &CarryOnJob, observed: &Observed) -> Option<Vec<OtherBase>> {
    let of = |((_, pool), wanted): ((_, Option<&BaseModelPool>), &JobPool)| {
        let model = loaded(pool?)?;
        let choice = wanted.taps.as_ref().and_then(TapChoice::of);
        Some(OtherBase { taps: TapChoice::taps(choice.as_ref(), model.layers), hidden_size: model.hidden_size })
    };
    observed.pools(job).into_iter().zip(&job.spec.pools).skip(1).map(of).collect()
}

/// The plan for samples as long as the job lets them be, once the pool says what its model is; whether the limit of the trainer's pod is enough for it.
pub fn verdict(job: &CarryOnJob, observed: &Observed) -> Option<Verdict> {
    let (spec, pool) = (&job.spec, observed.pool.as_ref()?);
    let model = loaded(pool)?;
    let tapped = spec.pools.first()?;
    let choice = tapped.taps.as_ref().and_then(TapChoice::of);
    let shape = spec.head.shape(spec.task, TapChoice::taps(choice.as_ref(), model.layers), model.hidden_size, spec.data.max_length);
    let shape = shape.mixing(others(job, observed)?);
    let tally = Trainer {
        shape: &shape,
        training: &spec.training,
        dtype: pool.spec.dtype,
        states: tapped.hidden_states_dtype,
        vocab_size: model.vocab_size,
        rows: [spec.training.per_device_train_batch_size, spec.task.group(), spec.data.max_length].map(u64::from).iter().product(),
        evaluated: !spec.data.split.evaluation.is_empty(),
    }
    .tally();
    let planned =
        format!("batches of {} samples of {} tokens take {tally}", spec.training.per_device_train_batch_size, spec.data.max_length);
    let limit = spec.trainer.resources.limits.get("memory").and_then(|limit| Bytes::read(&limit.0));
    Some(match limit {
        Some(limit) if limit.0 < tally.total() + CONTEXT => {
            let context = megabytes(CONTEXT);
            let message = format!("{planned}, and the trainer up to {context}: more than spec.trainer.resources.limits.memory: {limit}");
            Verdict::no(MEMORY_PLANNED, "LimitTooLow", message)
        }
        _ => Verdict::yes(MEMORY_PLANNED, "Planned", planned),
    })
}
