//! What a finished run leaves: the artifact, and a marker that makes a second start a matter of reading.
//!
//! A job that is deleted and applied again finds the folder of its namesake. **Invariant** it takes no head away: artifact and report lie under the
//! artifact's digest. Of an earlier run with another configuration or other data it keeps the hidden states, which are the base's alone, and
//! replaces what only that run could use: checkpoints, metrics and the marker. Nothing found is believed before it is known to be of this base;
//! checkpoints of another one are set aside, since it may come back.

use std::path::{Path, PathBuf};

use carryon_crds::job::{Metric, Training};
use carryon_crds::names::artifact_folder;
use carryon_crds::wire::head::{Lineage, Metrics};
use carryon_crds::wire::limits::MAX_POOLS;
use carryon_crds::wire::{BaseReference, HeadManifest, HeadShape, TerminationMessage};
use serde::{Deserialize, Serialize};

use crate::files;
use crate::head::artifact::{self, Artifact, ArtifactError, WEIGHTS_FILE};
use crate::head::{Weights, parameters};
use crate::train::checkpoint::State;
use crate::train::error::TrainError;
use crate::train::figures::Figures;
use crate::train::metrics::{MetricsPaths, finite};
use crate::train::plan::Inputs;
use crate::train::pool::Base;
use crate::train::seeds::Outcome;

/// Names the finished run.
const MARKER_FILE: &str = "finished.json";
/// Begins the name of the folder of one of several seeds.
const SEED_FOLDER: &str = "seed-";

/// Places inside the output folder.
#[derive(Clone, Debug)]
pub struct Places {
    /// The folder itself.
    pub root: PathBuf,
    /// Where hidden states lie that other jobs read and write too.
    pub shared_cache: Option<PathBuf>,
    /// Where one of several seeds has its checkpoints and metrics, inside the folder; the folder itself when there is one alone.
    pub seed: Option<PathBuf>,
}

impl Places {
    /// Those of a run in the folder `root`, and of its hidden states in `shared_cache` where others have theirs too.
    pub fn new(root: &Path, shared_cache: Option<&Path>) -> Self {
        Self { root: root.to_owned(), shared_cache: shared_cache.map(Path::to_owned), seed: None }
    }

    /// Those of a training with its seed, which may be one of several.
    #[must_use]
    pub fn of_seed(&self, training: &Training) -> Self {
        let folder = |_: &_| PathBuf::from(format!("{SEED_FOLDER}{}", training.seed));
        Self { seed: training.seeds.as_ref().map(folder), ..self.clone() }
    }

    /// Those of all seeds that anything is there of, of whatever run.
    pub fn of_all_seeds(&self) -> Vec<Self> {
        let seeds = entries(&self.root).filter_map(|path| path.file_name().map(PathBuf::from));
        let seeds = seeds.filter(|name| name.to_str().is_some_and(|name| name.starts_with(SEED_FOLDER)));
        let of = |seed: Option<PathBuf>| Self { seed, ..self.clone() };
        std::iter::once(of(None)).chain(seeds.map(|seed| of(Some(seed)))).collect()
    }

    /// The folder of what each of several seeds has of its own.
    fn own(&self) -> PathBuf {
        self.seed.as_ref().map_or_else(|| self.root.clone(), |seed| self.root.join(seed))
    }

    /// head.safetensors, head.json and report.html of the head with this digest.
    pub fn head(&self, digest: &str) -> PathBuf {
        self.root.join(artifact_folder(digest))
    }

    /// One line a step, and the same for TensorBoard, which looks for `tfevents` in names.
    pub fn metrics(&self) -> MetricsPaths {
        MetricsPaths { lines: self.own().join("metrics.jsonl"), events: self.own().join("tensorboard/events.out.tfevents.carryon") }
    }

    /// For people.
    pub fn report(&self, digest: &str) -> PathBuf {
        self.head(digest).join("report.html")
    }

    /// Checkpoints.
    pub fn checkpoints(&self) -> PathBuf {
        self.own().join("checkpoints")
    }

    /// Hidden states of a pool, counted from 0.
    pub fn cache(&self, pool: usize) -> PathBuf {
        self.root.join(if pool == 0 { "cache".to_owned() } else { format!("cache-{pool}") })
    }

    /// Of all pools there may be.
    fn caches(&self) -> impl Iterator<Item = PathBuf> {
        (0..MAX_POOLS).flat_map(|pool| entries(&self.cache(pool)))
    }

    /// Where heads lie, each in a folder of its own.
    fn heads(&self) -> PathBuf {
        self.root.join("heads")
    }

    /// Bytes of the caches: one folder a key, a few files in it.
    pub fn cache_bytes(&self) -> u64 {
        self.caches().map(|folder| file_bytes(&folder)).sum()
    }

    /// Bytes of the checkpoints that training may go on from, and of those it has passed, of all seeds.
    pub fn checkpoint_bytes(&self) -> u64 {
        self.of_all_seeds().iter().map(|places| file_bytes(&places.checkpoints())).sum()
    }

    /// Removes what a trainer that was killed was writing. Nobody else may write to the folder.
    ///
    /// # Errors
    /// A file cannot be removed.
    pub fn remove_temporaries(&self) -> Result<(), TrainError> {
        let seeds = self.of_all_seeds().into_iter().flat_map(|places| [places.own(), places.checkpoints()]);
        let folders = seeds.chain(self.caches()).chain(entries(&self.heads()));
        folders.into_iter().try_for_each(|folder| files::remove_temporaries(&folder).map_err(TrainError::file("clean", folder)))
    }
}

fn entries(folder: &Path) -> impl Iterator<Item = PathBuf> + use<> {
    std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path())
}

fn file_bytes(folder: &Path) -> u64 {
    entries(folder).filter_map(|path| path.metadata().ok()).filter(|metadata| metadata.is_file()).map(|metadata| metadata.len()).sum()
}

/// Content of the marker.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Marker {
    run: String,
    message: TerminationMessage,
}

/// The last words of an earlier start that finished the same run on the same base, if its head is still there, bit by bit.
pub fn finished(places: &Places, run: &str, base: &BaseReference) -> Option<TerminationMessage> {
    let text = std::fs::read(places.root.join(MARKER_FILE)).ok()?;
    let marker: Marker = serde_json::from_slice(&text).ok()?;
    let digest = marker.message.digest.as_ref().filter(|_| marker.run == run)?;
    let (artifact, _) = artifact::read(&places.head(digest)).ok()?;
    (artifact.digest == *digest && artifact.base == *base).then_some(marker.message)
}

/// Writes the marker: the last act of a run.
///
/// # Errors
/// The file cannot be written.
pub fn mark_finished(places: &Places, run: &str, message: &TerminationMessage) -> Result<(), TrainError> {
    let path = places.root.join(MARKER_FILE);
    let marker = Marker { run: run.to_owned(), message: message.clone() };
    let text = serde_json::to_string_pretty(&marker).expect("a marker is plain data") + "\n";
    files::write_atomic(&path, text.as_bytes()).map_err(TrainError::file("write", path))
}

/// The artifact of `weights`.
///
/// # Errors
/// Weights that do not fit the shape.
pub fn artifact(shape: HeadShape, base: &Base, weights: Weights) -> Result<Artifact, TrainError> {
    Artifact::new(shape, base.reference(), weights).map_err(artifact_error)
}

/// Writes head.safetensors.
///
/// # Errors
/// The file cannot be written.
pub fn write_weights(places: &Places, artifact: &Artifact) -> Result<(), TrainError> {
    artifact::write_weights(&places.head(&artifact.digest), artifact).map_err(artifact_error)
}

/// Writes head.json beside the weights, and gives it.
///
/// # Errors
/// The file cannot be written.
pub(super) fn write_manifest(
    places: &Places,
    artifact: &Artifact,
    base: &Base,
    inputs: &Inputs,
    (state, figures, outcome): (&State, &Figures, &Outcome),
) -> Result<HeadManifest, TrainError> {
    let described = &base.description;
    let general = state.best.map_or(state.general, |best| best.general);
    let eval_loss = state.best.and_then(|best| finite(best.loss));
    let found = |metric: Metric| if metric == Metric::Loss { eval_loss } else { figures.get(metric.name()).map(|figure| figure.value) };
    let thresholds = &inputs.config.evaluation.thresholds;
    let manifest = HeadManifest {
        format_version: artifact.shape.format_version,
        digest: artifact.digest.clone(),
        shape: artifact.shape.clone(),
        base: artifact.base.clone(),
        numerics: described.numerics.clone(),
        other_numerics: base.other_numerics(),
        chat_template: described.chat_template.clone(),
        end_token_ids: described.eos_token_ids.clone(),
        parameters: parameters::count(&artifact.shape),
        lineage: Lineage {
            job: inputs.config.job(),
            train_data: inputs.train.digest.clone(),
            evaluation_data: inputs.evaluation.as_ref().map(|files| files.digest.clone()),
            seed: inputs.config.training.seed,
            averaged_seeds: outcome.averaged.clone(),
            init_head: inputs.config.init_head.clone(),
            steps: state.step,
            worker_version: env!("CARGO_PKG_VERSION").to_owned(),
        },
        metrics: Metrics {
            train_loss: state.train_loss.and_then(finite),
            eval_loss,
            base_eval_loss: state.base_eval_loss.and_then(finite),
            general_loss: general.and_then(|general| finite(general.head)),
            base_general_loss: general.and_then(|general| finite(general.base)),
            eval_accuracy: state.best.and_then(|best| best.accuracy),
            evaluation: figures.clone(),
            unmet_thresholds: thresholds.iter().filter_map(|bound| bound.unmet(found(bound.metric))).collect(),
            seeds: outcome.seeds.clone(),
            train_seconds: state.train_seconds,
            peak_anonymous_bytes: state.peak_anonymous_bytes,
        },
    };
    artifact::write_manifest(&places.head(&artifact.digest), artifact, &manifest).map_err(artifact_error)?;
    Ok(manifest)
}

/// Path of the weights' file, for people.
pub fn weights_path(places: &Places, digest: &str) -> PathBuf {
    places.head(digest).join(WEIGHTS_FILE)
}

fn artifact_error(error: ArtifactError) -> TrainError {
    match error {
        ArtifactError::File { action, path, source } => TrainError::File { action, path, cause: source },
        error => TrainError::Head(error.to_string()),
    }
}

/// Writes the last words where Kubernetes looks for them, at most 4096 bytes. Best effort: nothing is left to report a failure to.
pub fn last_words(path: Option<&Path>, message: &TerminationMessage) {
    const MOST: usize = 4096;
    let mut message = message.clone();
    if message.message.len() > MOST / 2 {
        let cut = message.message.floor_char_boundary(MOST / 2);
        message.message.truncate(cut);
    }
    let text = serde_json::to_string(&message).expect("a message is plain data");
    if let Some(path) = path
        && let Err(error) = std::fs::write(path, text)
    {
        tracing::warn!("failed to write the termination message to {path:?}: {error}");
    }
}
