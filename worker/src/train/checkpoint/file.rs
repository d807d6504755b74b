//! A checkpoint as a safetensors file.
//!
//! Metadata: [`STATE_KEY`] holds [`State`] as JSON, [`DIGEST_KEY`] a digest over it and all tensors. Tensors: `weights.*` (now),
//! `average.*` (of them, where it is asked for), `best.*` (at the best evaluation, when there was one) and `optimizer.*`.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read as _, Seek as _, Write as _};
use std::path::Path;
use std::sync::Arc;

use carryon_crds::pool;
use carryon_crds::wire::limits::{CHECKPOINT_HEADER_BYTES, MAX_CHECKPOINT_BYTES};
use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};
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
    for (group, weights) in
        [("weights", Some(&checkpoint.weights)), ("average", checkpoint.average.as_ref()), ("best", checkpoint.best.as_ref())]
    {
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
    let header = header(&mut fs::File::open(path).ok()?).ok()?;
    serde_json::from_str(header.metadata().as_ref()?.get(STATE_KEY)?).ok()
}

/// What stands before the tensors.
fn header(file: &mut fs::File) -> Result<Metadata, String> {
    let mut length = [0; 8];
    file.read_exact(&mut length).map_err(text)?;
    let mut header = Vec::new();
    file.take(u64::from_le_bytes(length).min(CHECKPOINT_HEADER_BYTES)).read_to_end(&mut header).map_err(text)?;
    serde_json::from_slice(&header).map_err(|error| error.to_string())
}

/// Reads a checkpoint, one tensor after the other, or says what is wrong with it.
pub(super) fn read(path: &Path) -> Result<Checkpoint, String> {
    let mut file = fs::File::open(path).map_err(text)?;
    let length = file.metadata().map_err(text)?.len();
    if length > MAX_CHECKPOINT_BYTES {
        return Err(format!("{length} bytes, more than {MAX_CHECKPOINT_BYTES}"));
    }
    let header = header(&mut file)?;
    if file.stream_position().map_err(text)? + header.data_len() as u64 != length {
        return Err(format!("{length} bytes are not as many as its header says"));
    }
    let metadata = header.metadata().clone().unwrap_or_default();
    let state = metadata.get(STATE_KEY).ok_or("no state in its metadata")?;
    let mut hasher = Sha256::new_with_prefix(state);
    let mut parts = Parts::default();
    // They lie in the order of their names.
    for name in header.offset_keys() {
        let info = header.info(&name).ok_or("its header contradicts itself")?;
        let mut bytes = vec![0; info.data_offsets.1 - info.data_offsets.0];
        file.read_exact(&mut bytes).map_err(text)?;
        update(&mut hasher, &name, &info.shape, &bytes);
        parts.take(&name, info, bytes)?;
    }
    if metadata.get(DIGEST_KEY) != Some(&carryon_crds::wire::digest_of(hasher)) {
        return Err("its digest does not fit its content".to_owned());
    }
    let state: State = serde_json::from_str(state).map_err(|error| error.to_string())?;
    if state.format_version != FORMAT_VERSION {
        return Err(format!("format version {}, this worker reads {FORMAT_VERSION}", state.format_version));
    }
    let mut optimizer = OptimizerState { steps: state.optimizer_steps, tensors: parts.plain };
    for (name, (shape, codes)) in parts.codes {
        let scales = parts.scales.remove(&name).ok_or_else(|| format!("tensor {name:?} has no scales"))?;
        optimizer.tensors.insert(name.clone(), (shape, Moment::Int8 { map: map_of(&name), codes, scales }.into()));
    }
    let weights = parts.groups.remove("weights").unwrap_or_default().into();
    let mut others = ["average", "best"].map(|group| parts.groups.remove(group).map(Arc::new)).into_iter();
    Ok(Checkpoint { state, weights, average: others.next().flatten(), best: others.next().flatten(), optimizer })
}

/// Tensors, as they come.
#[derive(Default)]
struct Parts {
    groups: BTreeMap<String, Weights>,
    plain: BTreeMap<String, (Vec<usize>, Arc<Moment>)>,
    codes: BTreeMap<String, (Vec<usize>, Vec<u8>)>,
    scales: BTreeMap<String, Vec<f32>>,
}

impl Parts {
    fn take(&mut self, name: &str, info: &TensorInfo, bytes: Vec<u8>) -> Result<(), String> {
        let (group, name) = name.split_once('.').ok_or_else(|| format!("tensor {name:?} is of no group"))?;
        let dtype = match info.dtype {
            Dtype::F32 => pool::Dtype::Float32,
            Dtype::BF16 => pool::Dtype::Bfloat16,
            Dtype::U8 if group == "optimizer" => {
                self.codes.insert(name.to_owned(), (info.shape.clone(), bytes));
                return Ok(());
            }
            other => return Err(format!("tensor {name:?} has type {other:?}, expected F32 or BF16")),
        };
        let values = Values::from_bytes(&bytes, dtype);
        match (group, name.strip_suffix(SCALES)) {
            ("optimizer", Some(codes)) => drop(self.scales.insert(codes.to_owned(), values.floats().into_owned())),
            ("optimizer", None) => drop(self.plain.insert(name.to_owned(), (info.shape.clone(), Moment::Plain(values).into()))),
            _ => {
                let weight = Weight { shape: info.shape.clone(), values };
                self.groups.entry(group.to_owned()).or_default().insert(name.to_owned(), weight);
            }
        }
        Ok(())
    }
}

fn text(error: std::io::Error) -> String {
    error.to_string()
}

/// Over the state and every tensor's name, shape and bytes, in the order of names.
fn digest<'a>(state: &str, tensors: impl Iterator<Item = (&'a str, &'a [usize], &'a [u8])>) -> String {
    let mut hasher = Sha256::new_with_prefix(state);
    tensors.for_each(|(name, shape, bytes)| update(&mut hasher, name, shape, bytes));
    carryon_crds::wire::digest_of(hasher)
}

fn update(hasher: &mut Sha256, name: &str, shape: &[usize], bytes: &[u8]) {
    hasher.update(format!("\n{name} {shape:?}\n"));
    hasher.update(bytes);
}
