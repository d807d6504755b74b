//! How tokens are drawn, as gateways tell pools.

use serde::{Deserialize, Serialize};

/// Most tokens whose logits may be moved.
pub const MAX_LOGIT_BIAS: usize = 1024;

/// What happens to the logits before a token is drawn, in vLLM's order: bias, the penalties, temperature, `min_p`, `top_k`, `top_p`. A member
/// that a pool does not know is refused: it would draw other tokens without a word.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Sampling {
    /// Added to the logits of these tokens, at most [`MAX_LOGIT_BIAS`].
    pub logit_bias: Vec<(u32, f32)>,
    /// Divides the positive logits of the tokens of prompt and answer, and multiplies the others; 1 is off.
    pub repetition_penalty: f32,
    /// Taken from a token's logit for each time the answer holds it.
    pub frequency_penalty: f32,
    /// Taken from the logits of the tokens that the answer holds.
    pub presence_penalty: f32,
    /// Leaves out what is less likely than this share of the likeliest; 0 is off.
    pub min_p: f32,
    /// Leaves out all but this many of the likeliest; 0 is off.
    pub top_k: u32,
}

impl Default for Sampling {
    fn default() -> Self {
        let (frequency_penalty, presence_penalty) = (0.0, 0.0);
        Self { logit_bias: Vec::new(), repetition_penalty: 1.0, frequency_penalty, presence_penalty, min_p: 0.0, top_k: 0 }
    }
}

impl Sampling {
    /// Name of the first member that asks for something.
    pub fn asked(&self) -> Option<&'static str> {
        let members = [
            ("logit_bias", !self.logit_bias.is_empty()),
            ("repetition_penalty", self.repetition_penalty != 1.0),
            ("frequency_penalty", self.frequency_penalty != 0.0),
            ("presence_penalty", self.presence_penalty != 0.0),
            ("min_p", self.min_p != 0.0),
            ("top_k", self.top_k != 0),
        ];
        members.into_iter().find_map(|(name, asked)| asked.then_some(name))
    }

    /// Whether no member asks for anything.
    pub fn is_nothing(&self) -> bool {
        self.asked().is_none()
    }
}
