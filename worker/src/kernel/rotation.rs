//! Rotary embedding.

/// Frequencies of a rotary embedding.
#[derive(Clone, Debug, PartialEq)]
pub struct Rotation {
    /// One frequency per pair of a head's values, in radians a position.
    pub frequencies: Vec<f32>,
    /// Factor of cosines and sines, usually 1.
    pub magnitude: f32,
}

impl Rotation {
    /// The plain embedding: `theta^(-2i/head_dim)` for pair i.
    pub fn new(theta: f64, head_dim: usize) -> Self {
        let frequency = |i| (1.0 / theta.powf(2.0 * i as f64 / head_dim as f64)) as f32;
        Self { frequencies: (0..head_dim / 2).map(frequency).collect(), magnitude: 1.0 }
    }

    /// Pairs of a head's values.
    pub fn pairs(&self) -> usize {
        self.frequencies.len()
    }

    /// Writes cosine and sine of every pair at `position`. Angles are rounded to f32, as checkpoints are trained with.
    pub fn at(&self, position: usize, cosine: &mut [f32], sine: &mut [f32]) {
        for ((frequency, cosine), sine) in self.frequencies.iter().zip(cosine).zip(sine) {
            let (s, c) = f64::from(position as f32 * frequency).sin_cos();
            (*cosine, *sine) = (c as f32 * self.magnitude, s as f32 * self.magnitude);
        }
    }
}
