//! A run, from its inputs and the checkpoint it goes on from.

use std::sync::Arc;

use carryon_crds::job::{LossPlace, Task, Training};
use carryon_crds::wire::Numerics;
use tokio::runtime::Handle;

use crate::kernel::Backward;
use crate::train::average::Average;
use crate::train::cached::PoolStates;
use crate::train::checkpoint::{Checkpoint, Folder};
use crate::train::data::DataSet;
use crate::train::error::TrainError;
use crate::train::fit::Run;
use crate::train::lock::Lock;
use crate::train::loss::{ContrastLoss, LabelLoss, LocalLoss, Loss, PairLoss, PreferenceLoss, RemoteLoss, SetLoss, ValueLoss, weights};
use crate::train::memory::Watch;
use crate::train::metrics::Metrics;
use crate::train::optim::Optimizers;
use crate::train::output::Places;
use crate::train::plan::{self, Inputs};
use crate::train::pool::{Base, pool_error};
use crate::train::progress::Console;
use crate::train::room;
use crate::train::schedule::Schedule;
use crate::train::sets::Data;
use crate::train::states::Ahead;
use crate::train::step::{Learner, device_error};
use crate::train::stop::Stop;
use crate::train::tally;

/// What a run computes with.
#[derive(Clone)]
pub(super) struct Environment<B> {
    pub backend: B,
    pub handle: Handle,
    pub stop: Stop,
    pub lock: Arc<Lock>,
    pub memory: Watch,
}

impl Environment<()> {
    /// The same on a device.
    pub fn on<B>(self, backend: B) -> Environment<B> {
        let Self { backend: (), handle, stop, lock, memory } = self;
        Environment { backend, handle, stop, lock, memory }
    }
}

/// A run that goes on from a checkpoint, whose place is in `checkpoints`; it began at `began`.
///
/// # Errors
/// A checkpoint, cache or LM head that cannot be used; the device failed.
pub(super) fn prepare<B: Backward>(
    places: &Places,
    inputs: &Inputs,
    base: &Base,
    data: &Data,
    (checkpoints, checkpoint, began): (Folder, Checkpoint, i64),
    environment: Environment<B>,
    mut console: Console,
) -> Result<Run<PoolStates, B>, TrainError> {
    let config = &inputs.config;
    let (order, total_steps) = plan::order(config, &data.train, data.replay.as_ref());
    let Checkpoint { mut state, weights, average, best, optimizer } = checkpoint;
    state.total_steps = total_steps;
    console.resumed(&state);
    let mut optimizers = Optimizers::new(&config.training);
    optimizers.restore(&environment.backend, &weights, optimizer).map_err(|error| TrainError::Head(error.to_string()))?;
    let average = |decay| Average::new(&environment.backend, decay, average, &weights).map_err(device_error);
    let average = config.training.ema_decay.map(average).transpose()?;
    let pools = room::open_caches(places, data, base, config, total_steps, &console)?;
    let states = |data: &DataSet, replay: Option<&DataSet>| {
        let replay = replay.map(|replay| replay.samples.clone());
        Arc::new(PoolStates { pools: pools.clone(), samples: data.samples.clone(), replay })
    };
    let measured = |data: &DataSet| (data.samples.clone(), states(data, None));
    let schedule = Schedule { warmup: config.training.warmup_steps, total: total_steps, min_ratio: config.training.min_lr_ratio };
    let trainer = tally::trainer(inputs, base, data);
    let planned = trainer.tally();
    console.note(&tally::outlook(&planned));
    Ok(Run {
        learner: Learner {
            shape: data.shape.clone(),
            weights: environment.backend.train(weights).map_err(device_error)?,
            average,
            optimizers,
            schedule,
            training: config.training.clone(),
            loss: loss(inputs, base, &environment, data)?,
            backend: environment.backend,
            last_norm: state.grad_norm,
        },
        metrics: Metrics::open(&places.metrics(), began, state.step, state.evaluated)?,
        memory: environment.memory,
        planned: planned.total(),
        state,
        best,
        order,
        train: states(&data.train, data.replay.as_ref()),
        ahead: Ahead::of(&trainer),
        evaluation: data.evaluation.as_ref().map(measured),
        general: data.general.as_ref().map(measured),
        when: config.evaluation.clone(),
        save_steps: config.checkpoint.save_steps,
        checkpoints,
        lock: environment.lock,
        console,
        stop: environment.stop,
        runtime: environment.handle,
    })
}

/// Where training stands: at its last checkpoint, or before its first step, with the weights that `start` makes.
///
/// # Errors
/// A folder that cannot be read or changed; weights that there are not.
pub(super) fn stands(
    checkpoints: &Folder,
    inputs: &Inputs,
    base: &mut Base,
    start: impl Fn(&Base) -> Result<Checkpoint, TrainError>,
    console: &mut Console,
) -> Result<Checkpoint, TrainError> {
    let known = checkpoints.began(&inputs.run, &base.identity()).is_some();
    // Nothing that an earlier run has left is touched before the head to start from is known to be usable.
    let fresh = (!known).then(|| start(base)).transpose()?;
    match (resume(checkpoints, inputs, base, console)?, fresh) {
        (Some(checkpoint), _) | (None, Some(checkpoint)) => Ok(checkpoint),
        (None, None) => start(base),
    }
}

/// The checkpoint to go on from, if there is one.
fn resume(checkpoints: &Folder, inputs: &Inputs, base: &mut Base, console: &mut Console) -> Result<Option<Checkpoint>, TrainError> {
    let found = checkpoints.latest(&inputs.run, &base.identity())?;
    found.warnings.iter().for_each(|warning| console.warn(warning));
    let Some(checkpoint) = found.checkpoint else { return Ok(None) };
    let state = &checkpoint.state;
    let keep_to = |base: &mut Base, numerics: &Numerics| {
        if !base.keep_to(numerics) {
            console.warn(&format!(
                "the pool of {} computes with {} now, not {}: hidden states are asked for again",
                base.description.name,
                base.description.numerics.key(),
                numerics.key()
            ));
        }
    };
    keep_to(base, &state.numerics);
    base.others.iter_mut().zip(&state.other_numerics).for_each(|(other, numerics)| keep_to(other, numerics));
    console.resumed(state);
    console.note(&format!("resuming behind step {}", state.step));
    Ok(Some(checkpoint))
}

fn loss<B: Backward>(inputs: &Inputs, base: &Base, environment: &Environment<B>, data: &Data) -> Result<Box<dyn Loss>, TrainError> {
    let (training, counts) = (&inputs.config.training, &data.train.counts);
    let factors = (inputs.config.head.alpha, training.kl_coef.unwrap_or(Training::KL_COEF));
    let weights = |task| weights::of(training.class_weights.as_ref(), task, &data.shape.labels, counts);
    Ok(match (inputs.config.task, training.loss) {
        (task @ Task::Classification, _) => Box::new(LabelLoss { weights: weights(task)?, smoothing: training.label_smoothing_factor }),
        (task @ Task::MultiLabelClassification, _) => Box::new(SetLoss { weights: weights(task)? }),
        (Task::Embedding, _) => {
            let temperature = training.temperature.unwrap_or(ContrastLoss::TEMPERATURE);
            Box::new(ContrastLoss { dimensions: data.shape.outputs(), temperature })
        }
        (Task::Reward, _) => Box::new(PairLoss),
        (Task::Regression, _) => Box::new(ValueLoss { scale: counts.balance.scale() }),
        (Task::CausalLM, place) => token_loss(place, factors, base, environment)?,
        (Task::Dpo, place) => {
            let beta = training.beta.unwrap_or(PreferenceLoss::BETA);
            Box::new(PreferenceLoss { tokens: token_loss(place, factors, base, environment)?, beta })
        }
    })
}

/// The loss of tokens. Factors: of the head's output, and of the divergence on what is replayed.
fn token_loss<B: Backward>(
    place: LossPlace,
    (alpha, kl_coef): (f64, f64),
    base: &Base,
    environment: &Environment<B>,
) -> Result<Box<dyn Loss>, TrainError> {
    Ok(match place {
        LossPlace::Remote => Box::new(RemoteLoss {
            client: base.client.clone(),
            alpha,
            kl_coef,
            max_body_bytes: base.description.limits.max_body_bytes,
            max_rows: base.description.limits.max_request_tokens as usize,
            runtime: environment.handle.clone(),
            stop: environment.stop.clone(),
        }),
        LossPlace::Local => {
            let fetched = environment.handle.block_on(environment.stop.race(base.client.lm_head(&base.description)));
            let weight = fetched.ok_or(TrainError::Stopped { step: 0 })?.map_err(pool_error)?;
            Box::new(LocalLoss::new(&base.description, &weight, (alpha, kl_coef), environment.backend.clone())?)
        }
    })
}
