//! A trainer from its arguments to its exit: stages in order, each named in the progress.

use std::path::Path;
use std::sync::Arc;

use carryon_crds::job::KeptSeed;
use carryon_crds::pool::Dtype;
use carryon_crds::wire::{ExitCode, TerminationMessage};
use tokio::runtime::Handle;

use crate::kernel::{Backward, Cpu, Threads};
use crate::train::args::TrainArgs;
use crate::train::cached::PoolStates;
use crate::train::checkpoint::Folder;
use crate::train::device;
use crate::train::endpoint;
use crate::train::error::TrainError;
use crate::train::exact_match::ExactMatch;
use crate::train::finish::finish;
use crate::train::fit::Run;
use crate::train::lock::{Lock, Timing};
use crate::train::memory::{self, Watch};
use crate::train::output::{self, Places};
use crate::train::plan::Inputs;
use crate::train::pool::Base;
use crate::train::prepare::{Environment, prepare, stands};
use crate::train::progress::{Console, Phase};
use crate::train::seeds::{self, Ended, Outcome};
use crate::train::sets::Data;
use crate::train::start;
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
    let places = Places::new(&args.output, args.state_cache.as_deref());
    places.remove_temporaries()?;
    let threads = Threads::new(args.threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from)));
    let device = device::cuda(args.device, cfg!(feature = "cuda"))?;
    let mut base = connect(args, inputs, handle, stop, console)?;
    if let Some(message) = output::finished(&places, &inputs.run, &base.reference()) {
        console.note(&format!("already finished: {}", message.message));
        return Ok(message);
    }
    let known = folder(&places.of_seed(&inputs.config.training), inputs).began(&inputs.run, &base.identity());
    let began = known.unwrap_or_else(|| jiff::Timestamp::now().as_millisecond());
    base.stand_still(began);
    // Nothing that an earlier run has left is touched before the data are known to be usable.
    let data = Data::read(inputs, &base, &places, stop, console)?;
    ExactMatch::check(&inputs.config, data.evaluation.as_ref().map(|data| &*data.samples), &base.tokenizer)?;
    memory::return_large_buffers(data.shape.width);
    let memory = Watch::start(handle);
    let environment = Environment { backend: (), handle: handle.clone(), stop: stop.clone(), lock: lock.clone(), memory };
    let products = if inputs.config.training.bf16 { Dtype::Bfloat16 } else { Dtype::Float32 };
    let start = (args.init_head.as_deref(), began);
    match device {
        Some(device) => fit_and_finish(&places, inputs, &mut base, &data, start, environment.on(device), console),
        None => fit_and_finish(&places, inputs, &mut base, &data, start, environment.on(Cpu::new(threads).training_in(products)), console),
    }
}

/// The checkpoints in these places.
fn folder(places: &Places, inputs: &Inputs) -> Folder {
    Folder::new(places.checkpoints(), inputs.config.checkpoint.save_total_limit)
}

/// Trains on a device with one seed after the other, each from where it stands, and writes the head. Start: the head that it is at, if there is one, and
/// when the run began.
fn fit_and_finish<B: Backward>(
    places: &Places,
    inputs: &Inputs,
    base: &mut Base,
    data: &Data,
    (init_head, began): (Option<&Path>, i64),
    environment: Environment<B>,
    console: &mut Console,
) -> Result<TerminationMessage, TrainError> {
    let (device, _) = environment.backend.name(Dtype::Float32);
    console.note(&format!("the head is trained on {device}"));
    let keep = inputs.config.training.seeds.as_ref().map(|seeds| seeds.keep);
    let each: Vec<(Places, Inputs)> =
        inputs.config.training.each_seed().map(|training| (places.of_seed(&training), inputs.with(training))).collect();
    let mut ended = Vec::new();
    loop {
        let (own, with_seed) = &each[ended.len()];
        let seed = with_seed.config.training.seed;
        console.seed(ended.len(), each.len());
        if keep.is_some() {
            console.note(&format!("seed {seed}, {} of {}", ended.len() + 1, each.len()));
        }
        let first = if keep == Some(KeptSeed::Average) { inputs } else { with_seed };
        let start = |base: &Base| start::checkpoint(init_head, first, base, &data.shape, began);
        let checkpoints = folder(own, inputs);
        let checkpoint = stands(&checkpoints, with_seed, base, start, console)?;
        if ended.is_empty() {
            clear_others(places, &each, base, console)?;
        }
        let found = (checkpoints.clone(), checkpoint, began);
        let mut run = prepare(own, with_seed, base, data, found, environment.clone(), std::mem::take(console))?;
        let mut fitted = run.fit().map(|()| None);
        if fitted.is_ok() {
            ended.push(Ended { seed, state: run.state.clone(), checkpoints });
            if ended.len() == each.len() {
                fitted = finish_best(&each, &ended, keep, base, data, &mut run).map(Some);
            }
        }
        *console = run.console;
        if let Some(message) = fitted? {
            return Ok(message);
        }
    }
}

/// Removes what earlier runs have left of seeds that this one has not.
fn clear_others(places: &Places, each: &[(Places, Inputs)], base: &Base, console: &Console) -> Result<(), TrainError> {
    let (_, inputs) = &each[0];
    for other in places.of_all_seeds().iter().filter(|other| each.iter().all(|(own, _)| own.seed != other.seed)) {
        let found = folder(other, inputs).latest(&inputs.run, &base.identity())?;
        found.warnings.iter().for_each(|warning| console.warn(warning));
        other.metrics().remove()?;
    }
    Ok(())
}

/// Writes what is best of all that have ended, of which `run` is the last.
fn finish_best<B: Backward>(
    each: &[(Places, Inputs)],
    ended: &[Ended],
    keep: Option<KeptSeed>,
    base: &Base,
    data: &Data,
    run: &mut Run<PoolStates, B>,
) -> Result<TerminationMessage, TrainError> {
    let (best, outcome) = keep.map_or_else(|| Ok((0, Outcome::default())), |keep| seeds::choose(run, ended, keep))?;
    let (places, inputs) = &each[best];
    finish(places, inputs, base, data, &outcome, run)
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
