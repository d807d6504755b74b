//! A trainer from its arguments to its exit: stages in order, each named in the progress.

use std::path::Path;
use std::sync::Arc;

use carryon_crds::job::{LossPlace, Task, Training};
use carryon_crds::pool::Dtype;
use carryon_crds::wire::{ExitCode, Numerics, TerminationMessage};
use tokio::runtime::Handle;

use crate::kernel::{Backward, Cpu, Threads};
use crate::train::args::TrainArgs;
use crate::train::average::Average;
use crate::train::cached::PoolStates;
use crate::train::checkpoint::{Checkpoint, Folder};
use crate::train::data::DataSet;
use crate::train::device;
use crate::train::endpoint;
use crate::train::error::TrainError;
use crate::train::exact_match::ExactMatch;
use crate::train::finish::finish;
use crate::train::fit::Run;
use crate::train::lock::{Lock, Timing};
use crate::train::loss::{ContrastLoss, LabelLoss, LocalLoss, Loss, PairLoss, PreferenceLoss, RemoteLoss, SetLoss, ValueLoss, weights};
use crate::train::memory::{self, Watch};
use crate::train::metrics::Metrics;
use crate::train::optim::Optimizers;
use crate::train::output::{self, Places};
use crate::train::plan::{self, Inputs};
use crate::train::pool::{Base, pool_error};
use crate::train::progress::{Console, Phase};
use crate::train::room;
use crate::train::schedule::Schedule;
use crate::train::sets::Data;
use crate::train::start;
use crate::train::states::Ahead;
use crate::train::step::{Learner, device_error};
use crate::train::stop::Stop;
use crate::train::tally;

/// Trains a head and leaves it in the output folder. Blocks; must not be called inside a Tokio runtime.
///
/// # Errors
/// Why there is no head; [`TrainError::exit_code`] says whether trying again can help. The last words are written in any case.
pub fn run(args: &TrainArgs) -> Result<ExitCode, TrainError> {
    run_until(args, &Stop::default())
}

/// [`run`], stopped by `stop` as by SIGTERM.
///
/// # Errors
/// As [`run`].
pub fn run_until(args: &TrainArgs, stop: &Stop) -> Result<ExitCode, TrainError> {
    let mut console = Console::default();
    let snapshot = console.snapshot();
    let ended = train(args, stop, &mut console);
    console.finish();
    let message = match &ended {
        Ok(message) => message.clone(),
        Err(error) => TerminationMessage { message: error.to_string(), ..TerminationMessage::default() },
    };
    let progress = snapshot.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone();
    output::last_words(
        args.termination_log.as_deref(),
        &TerminationMessage { progress: message.progress.clone().or(Some(progress)), ..message },
    );
    match ended {
        Ok(_) => Ok(ExitCode::Complete),
        Err(error @ TrainError::Stopped { .. }) => {
            tracing::info!("{error}");
            Ok(ExitCode::Resume)
        }
        Err(error) => Err(error),
    }
}

fn train(args: &TrainArgs, stop: &Stop, console: &mut Console) -> Result<TerminationMessage, TrainError> {
    memory::keep_freed_pages();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let runtime = runtime.map_err(TrainError::file("start threads for", "the trainer"))?;
    let handle = runtime.handle();
    {
        let _inside = handle.enter();
        stop.set_on_signals().map_err(TrainError::file("listen to", "signals"))?;
    }
    if args.plan {
        return tally::show(args, &Inputs::read(&args.config, &args.data, stop)?, handle, stop, console);
    }
    handle.block_on(endpoint::listen(args.listen, console.snapshot())).map_err(TrainError::file("listen on", args.listen.to_string()))?;
    let inputs = Inputs::read(&args.config, &args.data, stop)?;
    let lock = Arc::new(lock(&args.output, handle, stop, console)?);
    let ended = train_alone(args, &inputs, handle, stop, console, &lock);
    // Tasks may still write to the folder: they end before another trainer may come.
    drop(runtime);
    // Whatever else went wrong: that the folder is another's comes first.
    ended.or_else(|error| lock.check().and(Err(error)))
}

/// The lock of the output folder, which another trainer may hold: one on a node that is out of reach, or one whose pod still ends.
fn lock(folder: &Path, handle: &Handle, stop: &Stop, console: &mut Console) -> Result<Lock, TrainError> {
    let pause = |time| handle.block_on(async { stop.race(tokio::time::sleep(time)).await }).ok_or(TrainError::Stopped { step: 0 });
    let told = |holder: &str| {
        console.phase(Phase::Waiting, 0, "for the output folder");
        console.note(&format!("waiting for the output folder {folder:?}: trainer {holder} holds it"));
    };
    Lock::take(folder, Timing::default(), stop, pause, told)
}

/// All that touches the output folder.
fn train_alone(
    args: &TrainArgs,
    inputs: &Inputs,
    handle: &Handle,
    stop: &Stop,
    console: &mut Console,
    lock: &Arc<Lock>,
) -> Result<TerminationMessage, TrainError> {
    let places = Places { root: args.output.clone(), shared_cache: args.state_cache.clone() };
    places.remove_temporaries()?;
    let threads = Threads::new(args.threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from)));
    let device = device::cuda(args.device, cfg!(feature = "cuda"))?;
    let mut base = connect(args, inputs, handle, stop, console)?;
    if let Some(message) = output::finished(&places, &inputs.run, &base.reference()) {
        console.note(&format!("already finished: {}", message.message));
        return Ok(message);
    }
    let checkpoints = Folder::new(places.checkpoints(), inputs.config.checkpoint.save_total_limit);
    let known = checkpoints.began(&inputs.run, &base.identity());
    let began = known.unwrap_or_else(|| jiff::Timestamp::now().as_millisecond());
    base.stand_still(began);
    // Nothing that an earlier run has left is touched before the data, and the head to start from, are known to be usable.
    let data = Data::read(inputs, &base, &places, stop, console)?;
    ExactMatch::check(&inputs.config, data.evaluation.as_ref().map(|data| &*data.samples), &base.tokenizer)?;
    memory::return_large_buffers(data.shape.width);
    let memory = Watch::start(handle);
    let start = |base: &Base| start::checkpoint(args.init_head.as_deref(), inputs, base, &data.shape, began);
    let fresh = known.is_none().then(|| start(&base)).transpose()?;
    let checkpoint = match (resume(&checkpoints, inputs, &mut base, console)?, fresh) {
        (Some(checkpoint), _) | (None, Some(checkpoint)) => checkpoint,
        (None, None) => start(&base)?,
    };
    let found = (checkpoints, checkpoint, began);
    let environment = Environment { backend: (), handle: handle.clone(), stop: stop.clone(), lock: lock.clone(), memory };
    let products = if inputs.config.training.bf16 { Dtype::Bfloat16 } else { Dtype::Float32 };
    match device {
        Some(device) => fit_and_finish(&places, inputs, &base, &data, found, environment.on(device), console),
        None => fit_and_finish(&places, inputs, &base, &data, found, environment.on(Cpu::new(threads).training_in(products)), console),
    }
}

/// Trains on a device, from a checkpoint on, and writes the head.
fn fit_and_finish<B: Backward>(
    places: &Places,
    inputs: &Inputs,
    base: &Base,
    data: &Data,
    found: (Folder, Checkpoint, i64),
    environment: Environment<B>,
    console: &mut Console,
) -> Result<TerminationMessage, TrainError> {
    let (device, _) = environment.backend.name(Dtype::Float32);
    console.note(&format!("the head is trained on {device}"));
    let mut run = prepare(places, inputs, base, data, found, environment, std::mem::take(console))?;
    let fitted = run.fit().and_then(|()| finish(places, inputs, base, data, &mut run));
    *console = run.console;
    fitted
}

/// The pool's base, once it answers.
pub(super) fn connect(args: &TrainArgs, inputs: &Inputs, runtime: &Handle, stop: &Stop, console: &mut Console) -> Result<Base, TrainError> {
    console.phase(Phase::Connecting, 0, "");
    let (wanted, given) = (inputs.config.other_pools.len(), args.other_pool.len());
    if wanted != given {
        return Err(TrainError::Configuration(format!("otherPools: the configuration names {wanted}, --other-pool {given}")));
    }
    start::check(&inputs.config, args.init_head.as_deref())?;
    let job = inputs.config.job();
    let connected = async { Base::connect(&args.pool, &job).await?.mixed_with(&args.other_pool, &job).await };
    let base = runtime.block_on(stop.race(connected)).unwrap_or(Err(TrainError::Stopped { step: 0 }))?;
    for Base { description, .. } in base.all() {
        console.note(&format!(
            "base {} · width {} · {} layers · {}",
            description.name,
            description.hidden_size,
            description.num_hidden_layers,
            description.numerics.key()
        ));
    }
    Ok(base)
}

/// What a run computes with.
struct Environment<B> {
    backend: B,
    handle: Handle,
    stop: Stop,
    lock: Arc<Lock>,
    memory: Watch,
}

impl Environment<()> {
    /// The same on a device.
    fn on<B>(self, backend: B) -> Environment<B> {
        let Self { backend: (), handle, stop, lock, memory } = self;
        Environment { backend, handle, stop, lock, memory }
    }
}

fn prepare<B: Backward>(
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
