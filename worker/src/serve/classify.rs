//! `POST /v1/classify`: labels and their probabilities, an addition to OpenAI's API.

use std::sync::Arc;

use carryon_crds::job::Task;
use carryon_crds::wire::Limits;
use serde_json::{Map, Value, json};

use super::error::ApiError;
use super::gateway::Gateway;
use super::models::Head;
use super::request::Asked;
use super::respond::short;

/// Most texts of a request.
const MAX_INPUTS: usize = 2048;

/// Texts to classify.
pub(super) struct Classification {
    /// Name of the model.
    model: Arc<str>,
    head: Arc<Head>,
    texts: Vec<Text>,
}

/// A text as token ids.
#[derive(Debug, PartialEq)]
struct Text {
    ids: Vec<u32>,
    /// Whether it was longer than the head's samples in training, and was cut as they were.
    truncated: bool,
}

/// Reads and checks `{"model"?, "input": text | [text…]}`.
pub(super) fn parse(asked: Asked<'_>, gateway: &Gateway) -> Result<Classification, ApiError> {
    let Asked { mut parameters, model, .. } = asked;
    let other = || ApiError::parameter("model", format!("{:?} is no classifier: use /v1/chat/completions.", model.name));
    let head = model.head.clone().filter(|head| head.artifact.shape.task == Task::Classification).ok_or_else(other)?;
    let inputs = inputs(parameters.take("input"))?;
    parameters.finish()?;
    let (cut, limit) = (head.artifact.shape.max_length, gateway.model.limits.max_model_len);
    let encode = |input: &String| bounded(gateway.tokenizer.encode(input, true)?, cut, limit);
    let texts = inputs.iter().map(encode).collect::<Result<_, _>>()?;
    Ok(Classification { model: model.name, head, texts })
}

/// A text's token ids, cut at `cut` when the head was trained so, and within the pool's limit.
fn bounded(mut ids: Vec<u32>, cut: Option<u32>, limit: u32) -> Result<Text, ApiError> {
    let whole = ids.len();
    ids.truncate(cut.map_or(usize::MAX, |cut| cut as usize));
    match ids.len() {
        0 => Err(ApiError::parameter("input", "input holds an empty text.")),
        length if length > limit as usize => Err(ApiError::context_length("input", length, limit)),
        length => Ok(Text { ids, truncated: length < whole }),
    }
}

impl Classification {
    /// Asks the pool, in as many requests as its limits demand.
    pub(super) async fn answer(self, gateway: &Gateway) -> Result<Value, ApiError> {
        let Self { model, head, texts } = self;
        let (sequences, truncated): (Vec<_>, Vec<_>) = texts.into_iter().map(|text| (text.ids, text.truncated)).unzip();
        let tokens: usize = sequences.iter().map(Vec::len).sum();
        let mut data: Vec<Value> = Vec::with_capacity(sequences.len());
        for sequences in batches(sequences, &gateway.model.limits) {
            let asked = sequences.len();
            let answer = gateway.classify(&head, sequences).await?;
            let labels = &head.artifact.shape.labels;
            if answer.scores.len() != asked || answer.scores.iter().any(|logits| logits.len() != labels.len()) {
                tracing::warn!("the pool answered {} classifications of {asked}", answer.scores.len());
                return Err(ApiError::unavailable("The pool answered with other labels than the head has."));
            }
            for logits in answer.scores {
                let mut result = verdict(data.len(), labels, &logits);
                result["truncated"] = truncated[data.len()].into();
                data.push(result);
            }
        }
        gateway.metrics.count_tokens(&model, u32::try_from(tokens).unwrap_or(u32::MAX), 0);
        Ok(json!({"object": "list", "model": &*model, "data": data, "usage": {"prompt_tokens": tokens, "total_tokens": tokens}}))
    }
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

/// Cuts a list so that each part is within the pool's limits.
fn batches(sequences: Vec<Vec<u32>>, limits: &Limits) -> Vec<Vec<Vec<u32>>> {
    let mut batches: Vec<Vec<Vec<u32>>> = Vec::new();
    let mut tokens = 0;
    for sequence in sequences {
        tokens += sequence.len();
        match batches.last_mut() {
            Some(batch) if batch.len() < limits.max_sequences as usize && tokens <= limits.max_request_tokens as usize => {
                batch.push(sequence)
            }
            _ => {
                tokens = sequence.len();
                batches.push(vec![sequence]);
            }
        }
    }
    batches
}

/// The likeliest label and the probability of each (softmax of the logits).
fn verdict(index: usize, labels: &[String], logits: &[f32]) -> Value {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let exponentials: Vec<f64> = logits.iter().map(|logit| f64::from(logit - largest).exp()).collect();
    let sum: f64 = exponentials.iter().sum();
    let best = labels.iter().zip(logits).find(|(_, logit)| **logit == largest).map(|(label, _)| label);
    let scores: Map<String, Value> = labels.iter().cloned().zip(exponentials.iter().map(|value| short((value / sum) as f32))).collect();
    json!({"object": "classification", "index": index, "label": best, "scores": scores})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_verdict_is_the_softmax_of_the_logits() {
        let labels = ["ham", "spam"].map(String::from);
        let verdict = verdict(3, &labels, &[0.0, 1.0]);
        assert_eq!(
            verdict,
            json!({"object": "classification", "index": 3, "label": "spam", "scores": {"ham": 0.26894143, "spam": 0.7310586}})
        );
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

    #[test]
    fn batches_stay_within_the_limits_and_keep_the_order() {
        let limits = Limits {
            max_model_len: 9,
            max_sequences: 2,
            max_request_tokens: 6,
            max_body_bytes: 0,
            max_num_seqs: None,
            max_head_bytes: None,
        };
        let lengths =
            |batches: Vec<Vec<Vec<u32>>>| batches.iter().map(|batch| batch.iter().map(Vec::len).collect()).collect::<Vec<Vec<_>>>();
        let sequences = [1, 1, 1, 5, 2, 6].map(|length| vec![0; length]).to_vec();
        assert_eq!(lengths(batches(sequences, &limits)), [vec![1, 1], vec![1, 5], vec![2], vec![6]]);
    }
}
