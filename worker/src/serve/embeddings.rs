//! `POST /v1/embeddings`, as OpenAI has it.

use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use carryon_crds::job::Task;
use serde_json::{Value, json};

use super::classify::{self, Text};
use super::error::ApiError;
use super::gateway::Gateway;
use super::models::Head;
use super::request::Asked;
use super::respond::short;

/// Texts to embed.
pub(super) struct Embedding {
    /// Name of the model.
    model: Arc<str>,
    head: Arc<Head>,
    texts: Vec<Text>,
    encoding: Encoding,
}

/// How numbers are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Encoding {
    /// As numbers.
    Float,
    /// Their f32, little-endian, in base64.
    Base64,
}

/// Reads and checks `{"model"?, "input": …, "encoding_format"?, "dimensions"?}`: a text, a list of texts, token ids, or a list of those.
pub(super) fn parse(asked: Asked<'_>, gateway: &Gateway) -> Result<Embedding, ApiError> {
    let Asked { mut parameters, model, .. } = asked;
    let other = || ApiError::parameter("model", format!("{:?} does not embed texts.", model.name));
    let head = model.head.clone().filter(|head| head.artifact.shape.task == Task::Embedding).ok_or_else(other)?;
    let encoding = match parameters.text("encoding_format")?.as_deref() {
        None | Some("float") => Encoding::Float,
        Some("base64") => Encoding::Base64,
        Some(_) => return Err(ApiError::parameter("encoding_format", "encoding_format must be float or base64.")),
    };
    let has = head.artifact.shape.outputs() as i64;
    if parameters.integer("dimensions", 1..=i64::from(u32::MAX))?.is_some_and(|dimensions| dimensions != has) {
        return Err(ApiError::parameter("dimensions", format!("This model's embeddings have {has} dimensions: leave it out.")));
    }
    let texts = match parameters.take("input") {
        Some(input) if holds_tokens(&input) => tokens(input, &head, gateway)?,
        input => classify::texts(input, &head, gateway)?,
    };
    parameters.finish()?;
    Ok(Embedding { model: model.name, head, texts, encoding })
}

/// Whether it is token ids, or a list of such.
fn holds_tokens(input: &Value) -> bool {
    let first = |value: &Value| value.as_array().and_then(|values| values.first()).cloned();
    first(input).is_some_and(|value| value.is_number() || value.is_array())
}

fn tokens(input: Value, head: &Head, gateway: &Gateway) -> Result<Vec<Text>, ApiError> {
    let refusal = |reason: String| ApiError::parameter("input", format!("input: {reason}."));
    let flat = input.as_array().is_some_and(|values| values.first().is_some_and(Value::is_number));
    let input = if flat { json!([input]) } else { input };
    let sequences: Vec<Vec<u32>> = serde_json::from_value(input).map_err(|_| refusal("lists of token ids were expected".to_owned()))?;
    if sequences.len() > classify::MAX_INPUTS {
        return Err(refusal(format!("{} lists, more than {}", sequences.len(), classify::MAX_INPUTS)));
    }
    if let Some(id) = sequences.iter().flatten().find(|id| **id >= gateway.model.vocab_size) {
        return Err(refusal(format!("{id} is no token of this model, which has {}", gateway.model.vocab_size)));
    }
    sequences.into_iter().map(|ids| classify::bounded(ids, head.artifact.shape.max_length, gateway.model.limits.max_model_len)).collect()
}

impl Embedding {
    /// Asks the pool.
    pub(super) async fn answer(self, gateway: &Gateway) -> Result<Value, ApiError> {
        let Self { model, head, texts, encoding } = self;
        let (found, tokens) = classify::ask(gateway, &model, &head, texts).await?;
        let written = |(index, (row, _)): (usize, (Vec<f32>, bool))| {
            let embedding = write(&unit(&row).ok_or_else(|| ApiError::unavailable("The head's output is not finite."))?, encoding);
            Ok::<_, ApiError>(json!({"object": "embedding", "index": index, "embedding": embedding}))
        };
        let data = found.into_iter().enumerate().map(written).collect::<Result<Vec<_>, _>>()?;
        Ok(json!({"object": "list", "model": &*model, "data": data, "usage": {"prompt_tokens": tokens, "total_tokens": tokens}}))
    }
}

/// Of length 1; none of what is not finite.
fn unit(row: &[f32]) -> Option<Vec<f32>> {
    let length = row.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>().sqrt();
    length.is_finite().then(|| row.iter().map(|value| (f64::from(*value) / length.max(1e-12)) as f32).collect())
}

fn write(row: &[f32], encoding: Encoding) -> Value {
    match encoding {
        Encoding::Float => row.iter().copied().map(short).collect(),
        Encoding::Base64 => STANDARD.encode(row.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>()).into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_embedding_has_length_one_in_either_encoding() {
        let row = unit(&[3.0, -4.0]).unwrap();
        assert_eq!(write(&row, Encoding::Float), json!([0.6, -0.8]));
        // base64.b64encode(struct.pack("<2f", 0.6, -0.8))
        assert_eq!(write(&row, Encoding::Base64), json!("mpkZP83MTL8="));
        assert_eq!((unit(&[f32::NAN]), unit(&[0.0])), (None, Some(vec![0.0])));
    }

    #[test]
    fn tokens_are_told_from_texts() {
        assert!(holds_tokens(&json!([1, 2])) && holds_tokens(&json!([[1], [2]])));
        assert!(!holds_tokens(&json!("a")) && !holds_tokens(&json!(["a"])) && !holds_tokens(&json!([])));
    }
}
