//! Rotary embeddings and their scalings, as transformers' `modeling_rope_utils.py` computes them.

use std::f64::consts::PI;
use std::sync::Arc;

use super::Keys;
use crate::kernel::Rotation;
use crate::model::error::ModelError;

/// A rotary embedding.
#[derive(Clone, Debug, PartialEq)]
pub struct RotationConfig {
    /// Base of the frequencies.
    pub theta: f64,
    /// Values of each head that are rotated, the first ones: an even number.
    pub dims: usize,
    /// Whether neighbours are pairs in the checkpoint; loading puts them into halves.
    pub interleaved: bool,
    /// What is done to the frequencies.
    pub scaling: Scaling,
}

/// What is done to the frequencies of a rotary embedding so that it reaches further.
#[derive(Clone, Debug, PartialEq)]
pub enum Scaling {
    /// Nothing.
    None,
    /// All are divided by this.
    Linear(f64),
    /// Llama 3: long waves are divided by `factor`, short ones kept, those between blended.
    Llama3 {
        /// Divisor.
        factor: f64,
        /// Waves longer than the original context over this are long.
        low: f64,
        /// Waves shorter than the original context over this are short.
        high: f64,
        /// Positions before the scaling.
        original: f64,
    },
    /// YaRN (arXiv 2309.00071).
    Yarn {
        /// Divisor.
        factor: f64,
        /// Rotations in the original context of the pair at which blending begins.
        fast: f64,
        /// The same where it ends.
        slow: f64,
        /// Positions before the scaling.
        original: f64,
        /// Whether the blended range is widened to whole pairs.
        truncate: bool,
        /// Factor of cosines and sines.
        magnitude: f64,
        /// What `mscale_all_dim` makes queries and keys longer by, where it is given; 1 otherwise.
        all_dims: f64,
    },
    /// A divisor for each pair, and a factor of cosines and sines. Layers share the divisors: as a checkpoint may say, there are many of both.
    Pairs(Arc<[f64]>, f64),
}

impl RotationConfig {
    /// The embedding that `rope_scaling` or `rope_parameters` describe, and how many positions it is good for where that is fewer than the
    /// configuration says.
    ///
    /// # Errors
    /// When a member is missing or of another type, or the kind of scaling is not known.
    pub fn read(keys: &Keys, theta: f64, head_dim: usize) -> Result<(Self, Option<usize>), ModelError> {
        let parameters = match keys.object("rope_parameters")? {
            Some(parameters) => Some(parameters),
            None => keys.object("rope_scaling")?,
        };
        let Some(parameters) = parameters else {
            return Ok((Self::plain(keys, theta, head_dim)?, None));
        };
        Self::of(keys, &parameters, theta, head_dim)
    }

    /// The embedding that `parameters` of the configuration `keys` describe.
    ///
    /// # Errors
    /// As for [`RotationConfig::read`].
    pub fn of(keys: &Keys, parameters: &Keys, theta: f64, head_dim: usize) -> Result<(Self, Option<usize>), ModelError> {
        let theta = parameters.optional("rope_theta")?.unwrap_or(theta);
        let kind = match parameters.optional::<String>("rope_type")? {
            Some(kind) => kind,
            None => parameters.optional("type")?.unwrap_or_else(|| "default".to_owned()),
        };
        let factor = || parameters.required::<f64>("factor");
        let context: usize = keys.required("max_position_embeddings")?;
        let original = match parameters.optional::<usize>("original_max_position_embeddings")? {
            Some(original) => original,
            None => keys.optional("original_max_position_embeddings")?.unwrap_or(context),
        };
        let (scaling, reach) = match kind.as_str() {
            "default" => (Scaling::None, None),
            "linear" => (Scaling::Linear(factor()?), None),
            // It changes with the length of the text beyond what the model was trained for, and nothing before.
            "dynamic" => (Scaling::None, Some(context)),
            "llama3" => {
                let (low, high) = (parameters.required("low_freq_factor")?, parameters.required("high_freq_factor")?);
                (Scaling::Llama3 { factor: factor()?, low, high, original: original as f64 }, None)
            }
            "yarn" => (yarn(parameters, context as f64, original as f64)?, None),
            // Beyond the original context every frequency would be another one, and with it what was computed before.
            "longrope" | "su" => (long(parameters, context as f64, original as f64)?, Some(original)),
            other => return Err(keys.unsupported("rope_type", format!("`{other}`"))),
        };
        let share = parameters.optional("partial_rotary_factor")?;
        Ok((Self::part_of(keys, share, theta, head_dim, scaling)?, reach))
    }

    /// An embedding that is not scaled.
    ///
    /// # Errors
    /// As for [`RotationConfig::read`].
    pub fn plain(keys: &Keys, theta: f64, head_dim: usize) -> Result<Self, ModelError> {
        Self::part_of(keys, None, theta, head_dim, Scaling::None)
    }

    /// Of each head the share `partial_rotary_factor` is rotated, or `rotary_dim` values.
    fn part_of(keys: &Keys, share: Option<f64>, theta: f64, head_dim: usize, scaling: Scaling) -> Result<Self, ModelError> {
        let share = match share {
            Some(share) => Some(share),
            None => keys.optional("partial_rotary_factor")?,
        };
        let dims = match keys.optional("rotary_dim")? {
            Some(dims) => dims,
            None => share.map_or(head_dim, |share: f64| (head_dim as f64 * share) as usize),
        };
        Ok(Self { theta, dims, interleaved: false, scaling })
    }

    /// Refuses what cannot be computed.
    pub(super) fn check(&self, keys: &Keys, head_dim: usize) -> Result<(), ModelError> {
        if self.dims == 0 || self.dims > head_dim || !self.dims.is_multiple_of(2) {
            return Err(keys.unsupported("rotary_dim", format!("{} of {head_dim}", self.dims)));
        }
        if !(self.theta.is_finite() && self.theta > 0.0) {
            return Err(keys.invalid("rope_theta", format!("{} is not a positive number", self.theta)));
        }
        if let Scaling::Pairs(divisors, _) = &self.scaling
            && divisors.len() != self.dims / 2
        {
            return Err(keys.invalid("rope_scaling", format!("{} factors for {} frequencies", divisors.len(), self.dims / 2)));
        }
        let rotation = self.rotation();
        let sound = |value: &f32| value.is_finite() && *value >= 0.0;
        if !rotation.frequencies.iter().all(sound) || !sound(&rotation.magnitude) {
            return Err(keys.invalid("rope_scaling", "a frequency would be no finite number"));
        }
        Ok(())
    }

    /// Its frequencies.
    pub fn rotation(&self) -> Rotation {
        let plain = Rotation::new(self.theta, self.dims);
        let each = |scaled: &dyn Fn(usize, f64) -> f64| {
            plain.frequencies.iter().enumerate().map(|(pair, frequency)| scaled(pair, f64::from(*frequency)) as f32).collect()
        };
        match &self.scaling {
            Scaling::None => plain,
            Scaling::Linear(factor) => Rotation { frequencies: each(&|_, frequency| frequency / factor), ..plain },
            Scaling::Llama3 { factor, low, high, original } => {
                let scaled = |_, frequency: f64| {
                    let wave = 2.0 * PI / frequency;
                    let kept = ((original / wave - low) / (high - low)).clamp(0.0, 1.0);
                    (1.0 - kept) * frequency / factor + kept * frequency
                };
                Rotation { frequencies: each(&scaled), ..plain }
            }
            Scaling::Yarn { factor, fast, slow, original, truncate, magnitude, .. } => {
                let (begin, end) = self.blended(*fast, *slow, *original, *truncate);
                let scaled = |pair: usize, frequency: f64| {
                    let interpolated = ((pair as f64 - begin) / (end - begin)).clamp(0.0, 1.0);
                    interpolated * frequency / factor + (1.0 - interpolated) * frequency
                };
                Rotation { frequencies: each(&scaled), magnitude: *magnitude as f32 }
            }
            Scaling::Pairs(divisors, magnitude) => {
                let frequencies = each(&|pair, frequency| frequency / divisors.get(pair).copied().unwrap_or(1.0));
                Rotation { frequencies, magnitude: *magnitude as f32 }
            }
        }
    }

    /// The pairs between which YaRN blends.
    fn blended(&self, fast: f64, slow: f64, original: f64, truncate: bool) -> (f64, f64) {
        let dims = self.dims as f64;
        let pair_of = |rotations: f64| dims * (original / (rotations * 2.0 * PI)).ln() / (2.0 * self.theta.ln());
        let (mut begin, mut end) = (pair_of(fast), pair_of(slow));
        if truncate {
            (begin, end) = (begin.floor(), end.ceil());
        }
        (begin, end) = (begin.max(0.0), end.min(dims - 1.0));
        if begin == end { (begin, end + 0.001) } else { (begin, end) }
    }
}

fn yarn(parameters: &Keys, context: f64, original: f64) -> Result<Scaling, ModelError> {
    let factor = parameters.optional("factor")?.unwrap_or(context / original);
    let scale = |by: f64| if factor <= 1.0 { 1.0 } else { 0.1 * by * factor.ln() + 1.0 };
    let (by, all) = (parameters.optional::<f64>("mscale")?, parameters.optional::<f64>("mscale_all_dim")?);
    let all = all.filter(|all| *all != 0.0);
    let inferred = match (by.filter(|by| *by != 0.0), all) {
        (Some(by), Some(all)) => scale(by) / scale(all),
        _ => scale(1.0),
    };
    Ok(Scaling::Yarn {
        factor,
        fast: parameters.optional("beta_fast")?.filter(|fast| *fast != 0.0).unwrap_or(32.0),
        slow: parameters.optional("beta_slow")?.filter(|slow| *slow != 0.0).unwrap_or(1.0),
        original,
        truncate: parameters.optional("truncate")?.unwrap_or(true),
        magnitude: parameters.optional("attention_factor")?.unwrap_or(inferred),
        all_dims: all.map_or(1.0, scale),
    })
}

fn long(parameters: &Keys, context: f64, original: f64) -> Result<Scaling, ModelError> {
    let factor = parameters.optional("factor")?.unwrap_or(context / original);
    let inferred = if factor <= 1.0 { 1.0 } else { (1.0 + factor.ln() / original.ln()).sqrt() };
    let divisors: Vec<f64> = parameters.required("short_factor")?;
    Ok(Scaling::Pairs(divisors.into(), parameters.optional("attention_factor")?.unwrap_or(inferred)))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn keys(values: serde_json::Value) -> Keys {
        let serde_json::Value::Object(values) = values else { unreachable!() };
        Keys::json(std::path::Path::new("config.json"), values, None)
    }

    #[test]
    fn kinds_that_are_not_known_are_refused_by_name() {
        let config = keys(json!({"max_position_embeddings": 64, "rope_scaling": {"type": "proportional", "factor": 2.0}}));
        let error = RotationConfig::read(&config, 1e4, 8).unwrap_err();
        assert_eq!(error.to_string(), "config.json: rope_type: `proportional` is not supported");
    }

    #[test]
    fn a_text_is_no_longer_than_its_frequencies_are_good_for() {
        let factors = json!({"type": "longrope", "short_factor": [1.0, 2.0], "long_factor": [4.0, 8.0]});
        let config = keys(json!({"max_position_embeddings": 4096, "original_max_position_embeddings": 64, "rope_scaling": factors}));
        let (rotation, reach) = RotationConfig::read(&config, 1e4, 4).unwrap();
        assert_eq!((rotation.rotation().frequencies.len(), reach), (2, Some(64)));
        assert!((rotation.rotation().magnitude - (1.0 + 64f32.ln() / 64f32.ln()).sqrt()).abs() < 1e-6);
    }
}
