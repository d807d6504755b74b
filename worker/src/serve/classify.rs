//! `POST /v1/classify`: labels and their probabilities, or the number that a regression found: an addition to OpenAI's API.

use std::sync::Arc;

use carryon_crds::job::Task;
use carryon_crds::wire::HeadShape;
use serde_json::{Map, Value, json};

use super::chat;
use super::error::ApiError;
use super::gateway::Gateway;
use super::models::Head;
use super::request::Asked;
use super::respond::short;
use crate::exchange::requests::within;

/// Most texts of a request.
pub(super) const MAX_INPUTS: usize = 2048;

/// Texts to classify.
pub(super) struct Classification {
    /// Name of the model.
    model: Arc<str>,
    head: Arc<Head>,
    texts: Vec<Text>,
}

/// A text as token ids.
#[derive(Debug, PartialEq)]
pub(super) struct Text {
    ids: Vec<u32>,
    /// Whether it was longer than the head's samples in training, and was cut as they were.
    truncated: bool,
}

/// Reads and checks `{"model"?, "input": text | [text…]}` or `{"model"?, "messages": […]}`.
pub(super) fn parse(asked: Asked<'_>, gateway: &Gateway) -> Result<Classification, ApiError> {
    let Asked { body, mut parameters, model } = asked;
    let other = || ApiError::parameter("model", format!("{:?} is no classifier: use /v1/chat/completions.", model.name));
    let head = model.head.clone().filter(|head| head.artifact.shape.task.is_pooled()).ok_or_else(other)?;
    if head.artifact.shape.task == Task::Embedding {
        return Err(ApiError::parameter("model", "This model embeds texts: use /v1/embeddings."));
    }
    let (cut, limit) = (head.artifact.shape.max_length, gateway.model.limits.max_model_len);
    let texts = match parameters.take("messages") {
        // As they are trained: up to the end of the last turn.
        Some(_) => {
            let ids = chat::whole(body, &mut parameters, gateway, head.artifact.shape.split_special_tokens)?;
            vec![bounded(ids, cut, limit)?]
        }
        None => texts(parameters.take("input"), &head, gateway)?,
    };
    parameters.finish()?;
    Ok(Classification { model: model.name, head, texts })
}

/// A text or texts as token ids.
pub(super) fn texts(input: Option<Value>, head: &Head, gateway: &Gateway) -> Result<Vec<Text>, ApiError> {
    let (cut, limit) = (head.artifact.shape.max_length, gateway.model.limits.max_model_len);
    inputs(input)?.iter().map(|input| bounded(gateway.tokenizer.encode(input, true)?, cut, limit)).collect()
}

/// A text's token ids, cut at `cut` when the head was trained so, and within the pool's limit.
pub(super) fn bounded(mut ids: Vec<u32>, cut: Option<u32>, limit: u32) -> Result<Text, ApiError> {
    let whole = ids.len();
    ids.truncate(cut.map_or(usize::MAX, |cut| cut as usize));
    match ids.len() {
        0 => Err(ApiError::parameter("input", "input holds an empty text.")),
        length if length > limit as usize => Err(ApiError::context_length("input", length, limit)),
        length => Ok(Text { ids, truncated: length < whole }),
    }
}

impl Classification {
    /// Asks the pool.
    pub(super) async fn answer(self, gateway: &Gateway) -> Result<Value, ApiError> {
        let Self { model, head, texts } = self;
        let (found, tokens) = ask(gateway, &model, &head, texts).await?;
        let shown = |(index, (logits, truncated)): (usize, (Vec<f32>, bool))| {
            let mut result = verdict(&head.artifact.shape, &logits);
            result["index"] = index.into();
            result["truncated"] = truncated.into();
            result
        };
        let data: Vec<Value> = found.into_iter().enumerate().map(shown).collect();
        Ok(json!({"object": "list", "model": &*model, "data": data, "usage": {"prompt_tokens": tokens, "total_tokens": tokens}}))
    }
}

/// What the head puts out for each text, whether that was cut, and how many tokens all have: in as many requests to the pool as its limits demand.
pub(super) async fn ask(gateway: &Gateway, model: &str, head: &Head, texts: Vec<Text>) -> Result<(Vec<(Vec<f32>, bool)>, usize), ApiError> {
    let (sequences, truncated): (Vec<_>, Vec<_>) = texts.into_iter().map(|text| (text.ids, text.truncated)).unzip();
    let tokens: usize = sequences.iter().map(Vec::len).sum();
    let mut found: Vec<Vec<f32>> = Vec::with_capacity(sequences.len());
    for sequences in within(sequences, &gateway.model.limits) {
        let asked = sequences.len();
        let answer = gateway.classify(head, sequences).await?;
        if answer.scores.len() != asked || answer.scores.iter().any(|outputs| outputs.len() != head.artifact.shape.outputs()) {
            tracing::warn!("the pool answered {} classifications of {asked}", answer.scores.len());
            return Err(ApiError::unavailable("The pool answered with another number of scores than the head has."));
        }
        found.extend(answer.scores);
    }
    gateway.metrics.count_tokens(model, u32::try_from(tokens).unwrap_or(u32::MAX), 0);
    Ok((found.into_iter().zip(truncated).collect(), tokens))
}

fn inputs(value: Option<Value>) -> Result<Vec<String>, ApiError> {
    let refusal = || ApiError::parameter("input", format!("input must be a text or a list of 1 to {MAX_INPUTS} texts."));
    let text = |value| match value {
        Value::String(text) => Ok(text),
        _ => Err(refusal()),
    };
    match value {
        Some(Value::Array(texts)) if (1..=MAX_INPUTS).contains(&texts.len()) => texts.into_iter().map(text).collect(),
        Some(value) => Ok(vec![text(value)?]),
        None => Err(refusal()),
    }
}

/// What the head found, by its task.
fn verdict(shape: &HeadShape, logits: &[f32]) -> Value {
    match shape.task {
        Task::MultiLabelClassification => labels(&shape.labels, logits),
        Task::Regression | Task::Reward => json!({"object": "score", "score": short(logits[0])}),
        _ => label(&shape.labels, logits),
    }
}

/// The likeliest label and the probability of each (softmax of the logits).
fn label(labels: &[String], logits: &[f32]) -> Value {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let exponentials: Vec<f64> = logits.iter().map(|logit| f64::from(logit - largest).exp()).collect();
    let sum: f64 = exponentials.iter().sum();
    let best = labels.iter().zip(logits).find(|(_, logit)| **logit == largest).map(|(label, _)| label);
    json!({"object": "classification", "label": best, "scores": scores(labels, exponentials.iter().map(|value| value / sum))})
}

/// The labels that are as likely as not, at least, and the probability of each (sigmoid of its logit).
fn labels(labels: &[String], logits: &[f32]) -> Value {
    let found: Vec<&String> = labels.iter().zip(logits).filter(|(_, logit)| **logit >= 0.0).map(|(label, _)| label).collect();
    let sigmoid = |logit: &f32| 1.0 / (1.0 + (-f64::from(*logit)).exp());
    json!({"object": "classification", "labels": found, "scores": scores(labels, logits.iter().map(sigmoid))})
}

fn scores(labels: &[String], probabilities: impl Iterator<Item = f64>) -> Map<String, Value> {
    labels.iter().cloned().zip(probabilities.map(|probability| short(probability as f32))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_verdict_is_the_softmax_of_the_logits_or_the_sigmoid_of_each() {
        let names = ["ham", "spam"].map(String::from);
        assert_eq!(
            label(&names, &[0.0, 1.0]),
            json!({"object": "classification", "label": "spam", "scores": {"ham": 0.26894143, "spam": 0.7310586}})
        );
        assert_eq!(
            labels(&names, &[-1.0, 1.0]),
            json!({"object": "classification", "labels": ["spam"], "scores": {"ham": 0.26894143, "spam": 0.7310586}})
        );
        assert_eq!(labels(&names, &[-1.0, -1.0])["labels"], json!([]));
    }

    #[test]
    fn input_is_a_text_or_texts() {
        assert_eq!(inputs(Some(json!("a"))).unwrap(), ["a"]);
        assert_eq!(inputs(Some(json!(["a", "b"]))).unwrap(), ["a", "b"]);
        for wrong in [None, Some(json!([])), Some(json!([1])), Some(json!({}))] {
            assert_eq!(inputs(wrong).unwrap_err().body()["error"]["param"], "input");
        }
    }

    #[test]
    fn a_text_is_cut_where_training_cut_it() {
        assert_eq!(bounded(vec![1, 2, 3], Some(2), 2).unwrap(), Text { ids: vec![1, 2], truncated: true });
        assert_eq!(bounded(vec![1, 2], Some(2), 2).unwrap(), Text { ids: vec![1, 2], truncated: false });
        assert_eq!(bounded(vec![1, 2, 3], None, 2).unwrap_err().body()["error"]["code"], "context_length_exceeded");
        assert_eq!(bounded(vec![], Some(2), 2).unwrap_err().body()["error"]["param"], "input");
    }
}
