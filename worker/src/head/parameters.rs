//! The names and shapes of a head's tensors, and the bounds of a [`HeadShape`].

use std::collections::BTreeMap;

use carryon_crds::common::Taps;
use carryon_crds::job::Task;
use carryon_crds::wire::HeadShape;
use carryon_crds::wire::head::FORMAT_VERSION;
use carryon_crds::wire::limits::{
    MAX_ALPHA, MAX_ATTENTION_HEADS, MAX_BLOCKS, MAX_DIMENSIONS, MAX_FEED_FORWARD, MAX_HIDDEN_SIZE, MAX_LABELS, MAX_PARAMETERS, MAX_POOLS,
    MAX_TAP_LAYERS, MAX_TOKENS, MAX_WIDTH,
};

use crate::kernel::Backend;
pub use crate::kernel::{Weight, Weights};

/// A [`HeadShape`] no head can have.
#[derive(Debug, thiserror::Error, PartialEq)]
#[error("{field} {reason}")]
pub struct ShapeError {
    /// Member of the shape.
    pub field: &'static str,
    /// What is wrong with it, with its value.
    pub reason: String,
}

fn refuse(field: &'static str, reason: String) -> Result<(), ShapeError> {
    Err(ShapeError { field, reason })
}

/// Checks every member of `shape` against its bounds, before anything is allocated from it.
///
/// # Errors
/// The first member out of bounds.
pub fn check(shape: &HeadShape) -> Result<(), ShapeError> {
    let ranges = [
        ("format_version", shape.format_version, 1, FORMAT_VERSION),
        ("hidden_size", shape.hidden_size, 1, MAX_HIDDEN_SIZE),
        ("width", shape.width, 2, MAX_WIDTH),
        ("blocks", shape.blocks, 0, MAX_BLOCKS),
        ("heads", shape.heads, 1, MAX_ATTENTION_HEADS),
        ("feed_forward", shape.feed_forward, 1, MAX_FEED_FORWARD),
        ("window", shape.window, 1, MAX_TOKENS),
    ];
    for (field, value, low, high) in ranges {
        if !(low..=high).contains(&value) {
            return refuse(field, format!("is {value}, not in {low}..={high}"));
        }
    }
    if !shape.width.is_multiple_of(2 * shape.heads) {
        return refuse("heads", format!("{} do not divide width {} into even parts", shape.heads, shape.width));
    }
    check_taps("taps", &shape.taps)?;
    if shape.others.len() >= MAX_POOLS || !shape.others.is_empty() && shape.format_version < 3 {
        return refuse("others", format!("are {}: up to {} from format version 3 on", shape.others.len(), MAX_POOLS - 1));
    }
    for other in &shape.others {
        check_taps("others.taps", &other.taps)?;
        if !(1..=MAX_HIDDEN_SIZE).contains(&other.hidden_size) {
            return refuse("others.hidden_size", format!("is {}, not in 1..={MAX_HIDDEN_SIZE}", other.hidden_size));
        }
    }
    for (field, value, low, high) in [
        ("alpha", shape.alpha, 0.0, MAX_ALPHA),
        ("rope_theta", shape.rope_theta, 1.0, 1e9),
        ("norm_epsilon", shape.norm_epsilon, 1e-12, 1.0),
    ] {
        if !(low..=high).contains(&value) {
            return refuse(field, format!("is {value}, not in {low}..={high}"));
        }
    }
    match shape.task {
        task if task.of_head() != task => refuse("task", format!("is {task:?}: what comes of that is CausalLM"))?,
        task if !task.has_labels() && !shape.labels.is_empty() => {
            refuse("labels", "are for tasks Classification and MultiLabelClassification only".into())?;
        }
        task if (task == Task::Embedding) != shape.dimensions.is_some() => {
            refuse("dimensions", "are for task Embedding, and needed by it".into())?
        }
        Task::Embedding if !shape.dimensions.is_some_and(|dimensions| (1..=MAX_DIMENSIONS).contains(&dimensions)) => {
            refuse("dimensions", format!("are {:?}, not 1 to {MAX_DIMENSIONS}", shape.dimensions))?;
        }
        task if shape.pooled_tokens.is_some_and(|tokens| !task.is_pooled() || tokens == 0 || shape.format_version < 2) => {
            refuse("pooled_tokens", "are 1 or more, for other tasks than CausalLM, from format version 2 on".into())?;
        }
        task if task.is_pooled() && shape.gate => refuse("gate", "is for task CausalLM only".into())?,
        task if task.has_labels() && !(2..=MAX_LABELS).contains(&shape.labels.len()) => {
            refuse("labels", format!("are {}, not 2 to {MAX_LABELS}", shape.labels.len()))?;
        }
        _ => {}
    }
    let parameters = count(shape);
    if parameters > MAX_PARAMETERS {
        return refuse("width", format!("gives {parameters} parameters, more than {MAX_PARAMETERS}"));
    }
    Ok(())
}

fn check_taps(field: &'static str, taps: &Taps) -> Result<(), ShapeError> {
    let layers = &taps.layers;
    if taps.count() == 0 || layers.len() > MAX_TAP_LAYERS || !layers.is_sorted_by(|left, right| left < right) {
        return refuse(field, format!("are {layers:?}: 1 to {MAX_TAP_LAYERS} ascending layers, or final, are needed"));
    }
    Ok(())
}

/// Number of parameters of a head of this shape.
pub fn count(shape: &HeadShape) -> u64 {
    of(shape).values().map(|dimensions| dimensions.iter().map(|&length| length as u64).product::<u64>()).sum()
}

/// Name and shape of every tensor of a head, as `crds::wire::head` lists them.
pub fn of(shape: &HeadShape) -> BTreeMap<String, Vec<usize>> {
    shape.tensors()
}

/// Gradients by the names of their tensors, each as long as its tensor.
pub type Gradients<B> = BTreeMap<String, <B as Backend>::Rows>;
