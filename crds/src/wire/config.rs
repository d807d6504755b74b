//! Worker configuration: rendered by the operator into a ConfigMap, read by the worker at start.
//! A worker ignores members that it does not know: an upgraded operator goes on with the images its objects were started with.
//! Places (folders, addresses) are arguments, never here, so that they can be mapped.

use serde::{Deserialize, Serialize};

use crate::common::{TapPreset, TapSelection, Taps, is_default};
use crate::job::{
    Checkpoint, DataFormat, Evaluation, HeadSpec, HiddenStatesDtype, OnError, Overlong, Split, Targets, Task, Thinking, Training,
};
use crate::pool::{Dtype, Engine};

/// `carryon-worker base --config FILE --model PATH --listen ADDRESS`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct BaseConfig {
    /// Name of the pool.
    pub name: String,
    /// Number type of weights and states.
    pub dtype: Dtype,
    /// Its device and its limits; quantities are numbers of bytes here.
    pub engine: Engine,
    /// Whether the text part of a model of text and images is wanted.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub text_only: bool,
}

/// `carryon-worker train --config FILE --pool URL [--other-pool URL…] --data DIR --output DIR --listen ADDRESS`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TrainConfig {
    /// Name of the job.
    pub name: String,
    /// Its namespace.
    pub namespace: String,
    /// What the head learns.
    pub task: Task,
    /// Taps; those of the preset Balanced when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub taps: Option<TapChoice>,
    /// Number type in which their states travel.
    #[serde(default, skip_serializing_if = "is_default")]
    pub hidden_states_dtype: HiddenStatesDtype,
    /// Further pools whose hidden states the head reads, in the order of their addresses.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub other_pools: Vec<OtherPool>,
    /// Shape of the head; where the one that it starts from lies is not told here.
    pub head: HeadSpec,
    /// Digest of the head at `--init-head`, whose blocks and bridges it starts from; random when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub init_head: Option<String>,
    /// What a line of the data holds.
    pub format: DataFormat,
    /// Files of each split, relative to `--data`.
    pub split: Split,
    /// Longest sample in tokens.
    pub max_length: u32,
    /// What happens to a longer one.
    pub overlong: Overlong,
    /// What happens to a line that cannot be read. It and the next four are left out where they are the defaults, as runs from before they were there have it.
    #[serde(default, skip_serializing_if = "is_default")]
    pub on_error: OnError,
    /// Which turns of a chat are learned.
    #[serde(default, skip_serializing_if = "is_default")]
    pub targets: Targets,
    /// Whether what the assistant thought is part of a chat.
    #[serde(default, skip_serializing_if = "is_default")]
    pub thinking: Thinking,
    /// Whether a plain text gets an end token.
    #[serde(default, skip_serializing_if = "is_default")]
    pub add_eos_token: bool,
    /// Whether control tokens in the contents of a chat are text like any other.
    #[serde(default = "crate::common::yes", skip_serializing_if = "super::is_yes")]
    pub split_special_tokens: bool,
    /// How to train.
    pub training: Training,
    /// When to evaluate.
    pub evaluation: Evaluation,
    /// When to save.
    pub checkpoint: Checkpoint,
}

/// What is read of a further pool.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct OtherPool {
    /// Taps; those of the preset Balanced when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub taps: Option<TapChoice>,
    /// Number type in which their states travel.
    #[serde(default, skip_serializing_if = "is_default")]
    pub hidden_states_dtype: HiddenStatesDtype,
}

/// Taps as a trainer is told them. A preset stands where a map is expected by trainers that know none: they refuse it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum TapChoice {
    /// By name.
    Preset(TapPreset),
    /// By number.
    Layers(Taps),
}

impl TapChoice {
    /// What a trainer is told of a job's taps; nothing of what is the default.
    pub fn of(selection: &TapSelection) -> Option<Self> {
        match selection.preset {
            Some(TapPreset::Balanced) => None,
            Some(preset) => Some(Self::Preset(preset)),
            None => Some(Self::Layers(Taps { layers: selection.layers.clone(), final_norm: selection.final_norm })),
        }
    }

    /// The taps in a base of `layers` decoder layers, ascending; those of the preset Balanced without a choice.
    pub fn taps(choice: Option<&Self>, layers: u32) -> Taps {
        match choice {
            None => Taps::of(TapPreset::Balanced, layers),
            Some(Self::Preset(preset)) => Taps::of(*preset, layers),
            Some(Self::Layers(taps)) => {
                let mut taps = taps.clone();
                taps.layers.sort_unstable();
                taps
            }
        }
    }
}

impl TrainConfig {
    /// The job as others name it, `NAMESPACE/NAME`.
    pub fn job(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }
}

/// `carryon-worker serve --config FILE --pool URL --head DIR [--head DIR…] --listen ADDRESS`: a folder for each head, in their order.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ServeConfig {
    /// Model name of the base alone in the OpenAI API.
    pub base_model_name: String,
    /// The heads, at least one.
    pub heads: Vec<ServeHead>,
    /// Origins whose web pages may use the API; `*` is every origin.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub allowed_origins: Vec<String>,
    /// Namespace of the deployment: its requests share with each other what the pool has computed of their prompts, and with no other's.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub namespace: String,
}

/// A head that a gateway serves.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ServeHead {
    /// Its name in the deployment's `spec.heads`.
    pub name: String,
    /// Its model name in the OpenAI API; no other head's, nor the base's.
    pub served_model_name: String,
    /// Digest the artifact must have.
    pub digest: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_preset_is_told_as_trainers_of_before_cannot_misread_it() {
        let told = |selection: &str| {
            let selection: TapSelection = serde_json::from_str(selection).unwrap_or_else(|error| panic!("{selection}: {error}"));
            serde_json::to_value(TapChoice::of(&selection)).unwrap_or_default()
        };
        assert_eq!(told(r#"{"preset": "Balanced"}"#), serde_json::Value::Null);
        assert_eq!(told(r#"{"preset": "Late"}"#), serde_json::json!("Late"));
        assert!(serde_json::from_value::<Taps>(told(r#"{"preset": "Final"}"#)).is_err());
        assert_eq!(told(r#"{"layers": [4, 1]}"#), serde_json::json!({"layers": [4, 1], "final": true}));
        for text in [r#""Late""#, r#"{"layers":[1],"final":false}"#] {
            assert_eq!(serde_json::to_string(&serde_json::from_str::<TapChoice>(text).ok()).ok().as_deref(), Some(text));
        }
    }
}
