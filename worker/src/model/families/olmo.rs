//! OLMo 2: norms stand behind attention and feed-forward layer, and over all queries and all keys.

use serde_json::json;

use super::plain;
use crate::model::config::{Keys, ModelConfig, Norms, QueryKeyNorm};
use crate::model::error::ModelError;

/// OLMo 2. GGUF files of OLMo 3 are called so too, and have a window.
pub fn config(keys: &Keys) -> Result<ModelConfig, ModelError> {
    keys.refuse_unless("sliding_window", &[json!(0)])?;
    let mut config = plain(keys)?;
    for layer in &mut config.layers {
        layer.norms = Norms::Post;
        layer.attention.query_key_norm = Some(QueryKeyNorm::Projection);
    }
    Ok(config)
}
