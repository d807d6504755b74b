//! The PyTorch fixtures of the head.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use carryon_crds::pool::Dtype as Number;
use carryon_crds::wire::HeadShape;
use carryon_worker::head::pass::PackedBatch;
use carryon_worker::head::{Weight, Weights};
use carryon_worker::numbers::{RowFormat, to_bytes};
use safetensors::{Dtype, SafeTensors};

pub fn fixture(name: &str) -> Vec<u8> {
    let path = Path::new("../tests/oracles/fixtures").join(name);
    std::fs::read(&path).unwrap_or_else(|error| panic!("failed to read {path:?}: {error}"))
}

/// Tensors of a fixture: floats as f32, integers apart.
pub fn tensors(bytes: &[u8]) -> (Weights, BTreeMap<String, Vec<u32>>) {
    let (mut floats, mut integers) = (Weights::new(), BTreeMap::new());
    for (name, view) in SafeTensors::deserialize(bytes).unwrap().iter() {
        let words = view.data().as_chunks::<4>().0.iter();
        let mut insert = |values: Vec<f32>| drop(floats.insert(name.to_owned(), Weight::new(view.shape().to_vec(), values)));
        match view.dtype() {
            Dtype::F32 => insert(words.map(|word| f32::from_le_bytes(*word)).collect()),
            Dtype::BF16 => insert(view.data().as_chunks::<2>().0.iter().map(|half| half::bf16::from_le_bytes(*half).to_f32()).collect()),
            Dtype::U32 => drop(integers.insert(name.to_owned(), words.map(|word| u32::from_le_bytes(*word)).collect())),
            other => panic!("{name} has type {other:?}"),
        }
    }
    (floats, integers)
}

/// A head, a packed batch, and what PyTorch makes of them.
#[derive(Clone)]
pub struct Case {
    pub shape: HeadShape,
    pub weights: Weights,
    pub expected: Weights,
    pub taps: Vec<Vec<f32>>,
    pub lengths: Vec<usize>,
    pub rows: Vec<u32>,
    pub targets: Vec<u32>,
    pub labels: Vec<u32>,
    pub lm_head: Vec<f32>,
    /// How rows travel.
    pub format: RowFormat,
}

impl Case {
    pub fn load(name: &str) -> Self {
        let head = fixture(&format!("head_{name}.safetensors"));
        let (_, header) = SafeTensors::read_metadata(&head).unwrap();
        let shape: HeadShape = serde_json::from_str(&header.metadata().as_ref().unwrap()["carryon.head"]).unwrap();
        let (floats, integers) = tensors(&fixture("head_batch.safetensors"));
        let lm_head = tensors(&fixture("tiny_llama/model.safetensors")).0.remove("lm_head.weight").unwrap().values.floats().into_owned();
        Self {
            weights: tensors(&head).0,
            expected: tensors(&fixture(&format!("head_{name}_expected.safetensors"))).0,
            lm_head,
            ..Self::batch_of(shape, "", &floats, &integers)
        }
    }

    /// A batch whose tensors are prefixed.
    pub fn batch_of(shape: HeadShape, prefix: &str, floats: &Weights, integers: &BTreeMap<String, Vec<u32>>) -> Self {
        let integer = |name: &str| integers[&format!("{prefix}{name}")].clone();
        Self {
            taps: (0..shape.taps.count()).map(|tap| floats[&format!("{prefix}tap.{tap}")].values.floats().into_owned()).collect(),
            lengths: integer("lengths").into_iter().map(|length| length as usize).collect(),
            rows: integer("rows"),
            targets: integer("targets"),
            labels: integer("labels"),
            shape,
            weights: Weights::new(),
            expected: Weights::new(),
            lm_head: Vec::new(),
            format: RowFormat::Plain(Number::Float32),
        }
    }

    pub fn hidden_size(&self) -> usize {
        self.shape.hidden_size as usize
    }

    pub fn lm_head_shape(&self) -> (usize, usize) {
        (self.lm_head.len() / self.hidden_size(), self.hidden_size())
    }

    pub fn tap_slices(&self) -> Vec<&[f32]> {
        self.taps.iter().map(Vec::as_slice).collect()
    }

    /// First row and number of rows of each sequence.
    pub fn sequences(&self) -> Vec<(usize, usize)> {
        let starts = self.lengths.iter().scan(0, |next, length| Some(std::mem::replace(next, *next + length)));
        starts.zip(self.lengths.iter().copied()).collect()
    }

    pub fn batch(&self) -> PackedBatch {
        let d = self.hidden_size();
        let number = if let RowFormat::Plain(number) = self.format { number } else { Number::Float32 };
        let bytes = |values: &[f32]| self.format.convert(to_bytes(values, number), number, d);
        let rows = |tap: &[f32]| self.sequences().iter().map(|(first, rows)| bytes(&tap[first * d..][..rows * d])).collect();
        let taps: Vec<_> = self.taps.iter().map(|tap| rows(tap)).collect();
        PackedBatch { formats: vec![self.format; taps.len()], taps, lengths: self.lengths.clone(), rows: self.rows.clone() }
    }

    /// x̂ of the rows that carry a target: the last tap is `final`.
    pub fn target_states(&self) -> Vec<f32> {
        let (d, x) = (self.hidden_size(), &self.taps[self.taps.len() - 1]);
        self.rows.iter().flat_map(|row| x[*row as usize * d..][..d].to_vec()).collect()
    }

    /// Some of the sequences.
    pub fn part(&self, sequences: Range<usize>) -> Self {
        let bounds = self.sequences();
        let (start, end) = (bounds[sequences.start].0, bounds[sequences.end - 1].0 + bounds[sequences.end - 1].1);
        let inside = |row: u32| (start..end).contains(&(row as usize));
        let d = self.hidden_size();
        Self {
            taps: self.taps.iter().map(|tap| tap[start * d..end * d].to_vec()).collect(),
            lengths: self.lengths[sequences].to_vec(),
            rows: self.rows.iter().copied().filter(|row| inside(*row)).map(|row| row - start as u32).collect(),
            targets: self.rows.iter().zip(&self.targets).filter(|(row, _)| inside(**row)).map(|(_, target)| *target).collect(),
            ..self.clone()
        }
    }
}

pub fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// The largest difference is within `tolerance` of the largest expected value.
pub fn assert_close(name: &str, found: &[f32], expected: &[f32], tolerance: f32) {
    assert_eq!(found.len(), expected.len(), "{name}");
    let largest = expected.iter().fold(0f32, |largest, value| largest.max(value.abs()));
    let worst = found.iter().zip(expected).map(|(found, expected)| (found - expected).abs()).fold(0f32, f32::max);
    assert!(worst <= tolerance * largest, "{name}: off by {worst} of {largest}");
}

/// Every gradient within 1e-4 of PyTorch's, relative to its largest value.
pub fn assert_gradients(case: &str, gradients: &BTreeMap<String, Vec<f32>>, expected: &Weights) {
    let expected: Vec<_> = expected.iter().filter(|(name, _)| !["loss", "output"].contains(&name.as_str())).collect();
    assert_eq!(gradients.keys().collect::<Vec<_>>(), expected.iter().map(|(name, _)| *name).collect::<Vec<_>>());
    for (name, weight) in expected {
        assert_close(&format!("{case} {name}"), &gradients[name], &weight.values.floats(), 1e-4);
    }
}
