//! A checkpoint as a safetensors file.
//!
//! Metadata: [`STATE_KEY`] holds [`State`] as JSON, [`DIGEST_KEY`] a digest over it and all tensors. Tensors: `weights.*` (now), `best.*`
//! (at the best evaluation, when there was one) and `optimizer.*`.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read as _, Write as _};
use std::path::Path;
use std::sync::Arc;

use carryon_crds::pool;
use carryon_crds::wire::limits::{CHECKPOINT_HEADER_BYTES, MAX_CHECKPOINT_BYTES};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use sha2::{Digest as _, Sha256};

use super::{Checkpoint, FORMAT_VERSION, State};
use crate::head::{Weight, Weights};
use crate::numbers::{Values, wire_dtype};
use crate::train::optim::{Moment, OptimizerState, map_of};
use crate::{files, tensor_file};

/// Metadata key of the state.
const STATE_KEY: &str = "carryon.checkpoint";
/// Metadata key of the digest.
const DIGEST_KEY: &str = "carryon.digest";

/// A tensor of the file: number type, shape, bytes as they lie there; the worker runs on little-endian machines only.
type Stored<'a> = (Dtype, Vec<usize>, &'a [u8]);

/// Behind the name of codes, that of their blocks' scales.
const SCALES: &str = ".scales";

/// Writes all of `checkpoint`, or nothing.
pub(super) fn write(path: &Path, checkpoint: &Checkpoint) -> std::io::Result<()> {
    let mut tensors: BTreeMap<String, Stored<'_>> = BTreeMap::new();
    for (group, weights) in [("weights", Some(&checkpoint.weights)), ("best", checkpoint.best.as_ref())] {
        for (name, Weight { shape, values }) in weights.into_iter().flat_map(|weights| weights.iter()) {
            tensors.insert(format!("{group}.{name}"), (wire_dtype(values.dtype()), shape.clone(), values.bytes()));
        }
    }
    for (name, (shape, moment)) in &checkpoint.optimizer.tensors {
        let (name, shape) = (format!("optimizer.{name}"), shape.clone());
        let stored = match &**moment {
            Moment::Plain(values) => (wire_dtype(values.dtype()), shape, values.bytes()),
            Moment::Int8 { codes, scales, .. } => {
                tensors.insert(format!("{name}{SCALES}"), (Dtype::F32, vec![scales.len()], bytemuck::cast_slice(scales)));
                (Dtype::U8, shape, &codes[..])
            }
        };
        tensors.insert(name, stored);
    }
    let state = serde_json::to_string(&checkpoint.state).expect("a state is plain data");
    let digest = digest(&state, tensors.iter().map(|(name, (_, shape, bytes))| (name.as_str(), shape.as_slice(), *bytes)));
    let infos = tensors.iter().map(|(name, (dtype, shape, _))| (name.as_str(), *dtype, shape.as_slice()));
    let header = tensor_file::header(&[(STATE_KEY, &state), (DIGEST_KEY, &digest)], infos);
    files::write_atomic_with(path, |file| {
        file.write_all(&header)?;
        tensors.values().try_for_each(|(_, _, bytes)| file.write_all(bytes))
    })
}

/// The state of a checkpoint, whose tensors are not looked at.
pub(super) fn state(path: &Path) -> Option<State> {
    let mut file = fs::File::open(path).ok()?;
    let mut length = [0; 8];
    file.read_exact(&mut length).ok()?;
    let mut header = Vec::new();
    file.take(u64::from_le_bytes(length).min(CHECKPOINT_HEADER_BYTES)).read_to_end(&mut header).ok()?;
    let header: serde_json::Value = serde_json::from_slice(&header).ok()?;
    serde_json::from_str(header["__metadata__"][STATE_KEY].as_str()?).ok()
}

/// Reads a checkpoint, or says what is wrong with it.
pub(super) fn read(path: &Path) -> Result<Checkpoint, String> {
    let length = fs::metadata(path).map_err(|error| error.to_string())?.len();
    if length > MAX_CHECKPOINT_BYTES {
        return Err(format!("{length} bytes, more than {MAX_CHECKPOINT_BYTES}"));
    }
    let content = fs::read(path).map_err(|error| error.to_string())?;
    let (_, header) = SafeTensors::read_metadata(&content).map_err(|error| error.to_string())?;
    let metadata = header.metadata().clone().unwrap_or_default();
    let state = metadata.get(STATE_KEY).ok_or("no state in its metadata")?;
    let file = SafeTensors::deserialize(&content).map_err(|error| error.to_string())?;
    let mut tensors: Vec<_> = file.iter().collect();
    tensors.sort_unstable_by_key(|(name, _)| *name);
    let found = digest(state, tensors.iter().map(|(name, tensor)| (*name, tensor.shape(), tensor.data())));
    if metadata.get(DIGEST_KEY) != Some(&found) {
        return Err("its digest does not fit its content".to_owned());
    }
    let state: State = serde_json::from_str(state).map_err(|error| error.to_string())?;
    if state.format_version != FORMAT_VERSION {
        return Err(format!("format version {}, this worker reads {FORMAT_VERSION}", state.format_version));
    }
    let mut groups: BTreeMap<&str, Weights> = BTreeMap::new();
    let mut optimizer = OptimizerState { steps: state.optimizer_steps, tensors: BTreeMap::new() };
    for (name, tensor) in tensors {
        let (group, name) = name.split_once('.').ok_or_else(|| format!("tensor {name:?} is of no group"))?;
        let shape = tensor.shape().to_vec();
        if group == "optimizer" {
            let scales = || file.tensor(&format!("{group}.{name}{SCALES}")).map_err(|error| error.to_string());
            let moment = match tensor.dtype() {
                Dtype::F32 if name.ends_with(SCALES) => continue,
                Dtype::U8 => {
                    Moment::Int8 { map: map_of(name), codes: tensor.data().to_vec(), scales: values(&scales()?)?.floats().into_owned() }
                }
                _ => Moment::Plain(values(&tensor).map_err(|problem| format!("tensor {name:?} {problem}"))?),
            };
            optimizer.tensors.insert(name.to_owned(), (shape, moment.into()));
        } else {
            let values = values(&tensor).map_err(|problem| format!("tensor {name:?} {problem}"))?;
            groups.entry(group).or_default().insert(name.to_owned(), Weight { shape, values });
        }
    }
    let (weights, best) = (groups.remove("weights").unwrap_or_default(), groups.remove("best"));
    Ok(Checkpoint { state, weights: weights.into(), best: best.map(Arc::new), optimizer })
}

fn values(tensor: &TensorView<'_>) -> Result<Values, String> {
    match tensor.dtype() {
        Dtype::F32 => Ok(Values::from_bytes(tensor.data(), pool::Dtype::Float32)),
        Dtype::BF16 => Ok(Values::from_bytes(tensor.data(), pool::Dtype::Bfloat16)),
        other => Err(format!("has type {other:?}, expected F32 or BF16")),
    }
}

/// Over the state and every tensor's name, shape and bytes, in the order of names.
fn digest<'a>(state: &str, tensors: impl Iterator<Item = (&'a str, &'a [usize], &'a [u8])>) -> String {
    let mut hasher = Sha256::new_with_prefix(state);
    for (name, shape, bytes) in tensors {
        hasher.update(format!("\n{name} {shape:?}\n"));
        hasher.update(bytes);
    }
    carryon_crds::wire::digest_of(hasher)
}
