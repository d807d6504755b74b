//! Initial weights: a pure function of shape and seed.

use carryon_crds::job::WeightDtype;
use carryon_crds::pool::Dtype;
use carryon_crds::wire::HeadShape;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng as _, SeedableRng as _};

use super::parameters::{self, Weight, Weights};

/// Weights to start training from.
///
/// Matrices are uniform in ±1/√(number of inputs), as PyTorch's `nn.Linear`; norm weights are one. `output.weight` is zero, so that step 0 has the
/// base's own loss; the gate is then about ½ everywhere (random `gate.weight`, zero bias): were both factors zero, neither would get a gradient.
/// Each tensor has its own random stream, numbered in the order of names.
pub fn weights(shape: &HeadShape, seed: u64) -> Weights {
    tensors(shape, seed).collect()
}

/// The same, one after the other.
pub fn tensors(shape: &HeadShape, seed: u64) -> impl Iterator<Item = (String, Weight)> {
    parameters::of(shape).into_iter().zip(0..).map(move |((name, dimensions), stream)| {
        let weight = match name.as_str() {
            "output.weight" | "gate.bias" | "classifier.bias" => Weight::filled(dimensions, 0.0),
            name if name.ends_with("layernorm.weight") => Weight::filled(dimensions, 1.0),
            _ => uniform(dimensions, seed, stream),
        };
        (name, weight)
    })
}

/// Weights as a job trains them: matrices in `dtype`.
pub fn in_dtype(weights: impl IntoIterator<Item = (String, Weight)>, dtype: WeightDtype) -> Weights {
    let convert = |(name, Weight { shape, values }): (String, Weight)| {
        let values = if shape.len() == 2 && dtype == WeightDtype::Bfloat16 { values.into_dtype(Dtype::Bfloat16) } else { values };
        (name, Weight { shape, values })
    };
    weights.into_iter().map(convert).collect()
}

/// Uniform in ±1/√n, n the last dimension.
fn uniform(shape: Vec<usize>, seed: u64, stream: u64) -> Weight {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    random.set_stream(stream);
    let inputs = shape.last().copied().unwrap_or(1);
    let bound = 1.0 / (inputs as f32).sqrt();
    let mut draw = || {
        let unit = (random.next_u32() >> 8) as f32 * (1.0 / (1 << 24) as f32); // [0, 1) in steps of 2⁻²⁴
        bound * (2.0 * unit - 1.0)
    };
    let values: Vec<f32> = (0..shape.iter().product()).map(|_| draw()).collect();
    Weight::new(shape, values)
}
