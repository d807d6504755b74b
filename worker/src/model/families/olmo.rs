//! OLMo 2: norms stand behind attention and feed-forward layer, and over all queries and all keys.

use super::plain;
use crate::model::config::{Keys, ModelConfig, Norms, QueryKeyNorm};
use crate::model::error::ModelError;

/// OLMo 2.
pub fn config(keys: &Keys) -> Result<ModelConfig, ModelError> {
    let mut config = plain(keys)?;
    for layer in &mut config.layers {
        layer.norms = Norms::Post;
        layer.attention.query_key_norm = Some(QueryKeyNorm::Projection);
    }
    Ok(config)
}
