//! What a configuration may say: sizes within bounds that fit together, numbers that are finite.

use super::{AttentionConfig, ExpertsConfig, FeedForwardConfig, Groups, Keys, LatentConfig, LayerConfig, ModelConfig, Norms};
use crate::model::error::ModelError;

/// Largest value of any size in a configuration: far beyond what exists, small enough that products of two do not overflow.
const MAX_SIZE: usize = 1 << 24;
/// Most values of a key: they have a frequency for every two.
const MAX_HEAD_DIM: usize = 1 << 14;
/// Most experts of a layer.
const MAX_EXPERTS: usize = 1 << 12;
/// Most layers.
const MAX_LAYERS: usize = 1 << 12;

impl ModelConfig {
    /// Refuses sizes that are zero, huge or do not divide. There is a layer: see [`checked_layers`].
    pub(in crate::model) fn checked(self, keys: &Keys) -> Result<Self, ModelError> {
        let attention = self.attention();
        let sizes = [
            ("hidden_size", self.hidden_size),
            ("num_attention_heads", attention.heads),
            ("num_key_value_heads", attention.key_value_heads),
            ("head_dim", attention.head_dim),
            ("vocab_size", self.vocab_size),
            ("max_position_embeddings", self.max_position_embeddings),
            ("sliding_window", self.layers.iter().filter_map(|layer| layer.attention.window).next().unwrap_or(1)),
        ];
        for (name, size) in sizes {
            check_size(keys, name, size)?;
        }
        self.layers.iter().try_for_each(|layer| layer.check(keys))?;
        attention.check(keys)?;
        if attention.output_bias && self.layers.iter().any(|layer| layer.norms != Norms::Pre) {
            return Err(keys.unsupported("attention_bias", "true beside a norm behind it"));
        }
        let numbers = [
            ("rms_norm_eps", Some(self.rms_norm_eps)),
            ("query_pre_attn_scalar", Some(attention.scale)),
            ("attn_logit_softcapping", attention.softcap),
            ("final_logit_softcapping", self.logit_softcap),
            ("hidden_size", Some(self.embedding_scale)),
        ];
        for (name, value) in numbers {
            if let Some(value) = value.filter(|value| !(value.is_finite() && *value > 0.0)) {
                return Err(keys.invalid(name, format!("{value} is not a positive number")));
            }
        }
        // Thousands of layers have one or two between them.
        let mut rotations = Vec::new();
        for rotation in self.layers.iter().filter_map(|layer| layer.attention.rotation.as_ref()) {
            if !rotations.contains(&rotation) {
                rotation.check(keys, attention.head_dim)?;
                rotations.push(rotation);
            }
        }
        Ok(self)
    }
}

impl AttentionConfig {
    fn check(&self, keys: &Keys) -> Result<(), ModelError> {
        if let Some(latent) = self.latent {
            latent.check(keys)?;
        }
        if !self.heads.is_multiple_of(self.key_value_heads) {
            let problem = format!("{} query heads are no multiple of {}", self.heads, self.key_value_heads);
            return Err(keys.invalid("num_key_value_heads", problem));
        }
        if !self.head_dim.is_multiple_of(2) || self.head_dim > MAX_HEAD_DIM {
            return Err(keys.unsupported("head_dim", self.head_dim.to_string()));
        }
        Ok(())
    }
}

impl LayerConfig {
    fn check(&self, keys: &Keys) -> Result<(), ModelError> {
        match &self.feed_forward {
            FeedForwardConfig::Gated { width, .. } => check_size(keys, "intermediate_size", *width),
            FeedForwardConfig::Experts(_) if self.norms != Norms::Pre => {
                Err(keys.unsupported("num_experts_per_tok", "experts before a norm"))
            }
            FeedForwardConfig::Experts(experts) => experts.check(keys),
        }
    }
}

impl ExpertsConfig {
    fn check(&self, keys: &Keys) -> Result<(), ModelError> {
        check_size(keys, "moe_intermediate_size", self.width)?;
        if !(1..=MAX_EXPERTS).contains(&self.count) || !(1..=self.count).contains(&self.top) {
            return Err(keys.invalid("num_experts_per_tok", format!("{} of {} experts", self.top, self.count)));
        }
        if let Some(shared) = self.shared {
            check_size(keys, "n_shared_experts", shared)?;
        }
        if let Some(Groups { count, top, .. }) = self.groups
            && !(count > 0 && self.count.is_multiple_of(count) && (1..=count).contains(&top) && self.count / count * top >= self.top)
        {
            return Err(keys.invalid("n_group", format!("{top} of {count} groups for {} of {} experts", self.top, self.count)));
        }
        if !self.factor.is_finite() {
            return Err(keys.invalid("routed_scaling_factor", format!("{} is not finite", self.factor)));
        }
        Ok(())
    }
}

impl LatentConfig {
    fn check(&self, keys: &Keys) -> Result<(), ModelError> {
        let sizes = [
            ("q_lora_rank", self.query_rank.unwrap_or(2)),
            ("kv_lora_rank", self.rank),
            ("qk_rope_head_dim", self.rope),
            ("qk_nope_head_dim", self.nope),
            ("v_head_dim", self.value),
        ];
        for (name, size) in sizes {
            check_size(keys, name, size)?;
            if !size.is_multiple_of(2) {
                return Err(keys.unsupported(name, size.to_string()));
            }
        }
        Ok(())
    }
}

/// A number of layers from outside, before anything is allocated by it.
pub fn checked_layers(keys: &Keys) -> Result<usize, ModelError> {
    match keys.required("num_hidden_layers")? {
        layers @ 1..=MAX_LAYERS => Ok(layers),
        layers => Err(keys.invalid("num_hidden_layers", format!("{layers} is not between 1 and {MAX_LAYERS}"))),
    }
}

fn check_size(keys: &Keys, name: &str, size: usize) -> Result<(), ModelError> {
    match size {
        1..=MAX_SIZE => Ok(()),
        _ => Err(keys.invalid(name, format!("{size} is not between 1 and {MAX_SIZE}"))),
    }
}
