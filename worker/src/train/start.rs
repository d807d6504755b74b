//! Where a run begins: at random weights, or at blocks and bridges of another head.

use std::io::ErrorKind;
use std::path::Path;

use carryon_crds::job::HeadInit;
use carryon_crds::wire::{HeadShape, TrainConfig};

use crate::head::artifact::{ArtifactError, Reader, WEIGHTS_FILE};
use crate::head::inherit::inherited;
use crate::head::{Weights, init};
use crate::train::checkpoint::{Checkpoint, State};
use crate::train::error::TrainError;
use crate::train::plan::Inputs;
use crate::train::pool::Base;

/// The configuration has the digest of the head to start from, the arguments have its place.
///
/// # Errors
/// One without the other.
pub(super) fn check(config: &TrainConfig, folder: Option<&Path>) -> Result<(), TrainError> {
    let refuse = |reason: &str| Err(TrainError::Configuration(reason.to_owned()));
    match (&config.init_head, folder) {
        _ if config.head.init != HeadInit::default() => refuse("head.init: a trainer is told of it by initHead and --init-head"),
        (Some(_), None) => refuse("initHead: the configuration names a head to start from, --init-head is missing"),
        (None, Some(_)) => refuse("initHead is missing from the configuration: --init-head needs the digest of its head"),
        _ => Ok(()),
    }
}

/// Where a run that began at `began` has its first step before it, with a head of `shape`.
///
/// # Errors
/// The head in `folder` cannot be read or started from.
pub(super) fn checkpoint(
    folder: Option<&Path>,
    inputs: &Inputs,
    base: &Base,
    shape: &HeadShape,
    began: i64,
) -> Result<Checkpoint, TrainError> {
    let state = State::new(inputs.run.clone(), base.identity(), base.description.numerics.clone(), began);
    let state = State { other_numerics: base.other_numerics(), ..state };
    let training = &inputs.config.training;
    let mut weights = init::in_dtype(init::tensors(shape, training.seed), training.weight_dtype);
    if let (Some(folder), Some(digest)) = (folder, &inputs.config.init_head) {
        inherit(&folder.join(WEIGHTS_FILE), digest, inputs, base, shape, &mut weights)?;
    }
    Ok(Checkpoint::start(state, weights))
}

/// Gives `weights` the blocks and bridges of the head in the file at `path`.
fn inherit(path: &Path, digest: &str, inputs: &Inputs, base: &Base, shape: &HeadShape, weights: &mut Weights) -> Result<(), TrainError> {
    let refuse = |reason: String| TrainError::Configuration(format!("head.init.fromHead: {reason}"));
    let unusable = |error: ArtifactError| match error {
        ArtifactError::File { action, path, source } if source.kind() != ErrorKind::NotFound => {
            TrainError::File { action, path, cause: source }
        }
        error => refuse(error.to_string()),
    };
    let reader = Reader::open(path).map_err(unusable)?;
    let names = inherited((&reader.shape, &reader.base), (shape, &base.reference()));
    let names = names.map_err(|error| refuse(format!("the head in {}: {error}", path.display())))?;
    let dtype = inputs.config.training.weight_dtype;
    let take = |name: &str, weight| {
        if let Some(name) = names.get(name) {
            weights.extend(init::in_dtype([(name.clone(), weight)], dtype));
        }
    };
    reader.read(digest, take).map_err(unusable)
}
