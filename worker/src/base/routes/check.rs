//! Bounds of requests: what passes here cannot make the device fail.

use carryon_crds::common::Taps;
use carryon_crds::wire::ModelDescription;

use crate::exchange::LossRequest;
use crate::exchange::mixing::FollowRequest;
use crate::exchange::wire::{ErrorCode, GenerateRequest, MAX_LOGIT_BIAS, MAX_LOGPROBS, Sampling, WireError};

type Checked = Result<(), WireError>;

fn invalid(message: String) -> Checked {
    Err(WireError::new(ErrorCode::InvalidRequest, message))
}

fn too_large(message: String) -> Checked {
    Err(WireError::new(ErrorCode::TooLarge, message))
}

pub(super) fn tokens(what: &str, tokens: &[u32], model: &ModelDescription) -> Checked {
    match tokens.iter().find(|token| **token >= model.vocab_size) {
        Some(token) => invalid(format!("{what} holds token {token}, the vocabulary has {}", model.vocab_size)),
        None => Ok(()),
    }
}

/// Whole sequences: their number, lengths and tokens.
pub(super) fn sequences(sequences: &[Vec<u32>], model: &ModelDescription) -> Checked {
    let limits = &model.limits;
    if sequences.len() > limits.max_sequences as usize {
        return too_large(format!("{} sequences exceed {}", sequences.len(), limits.max_sequences));
    }
    let total: usize = sequences.iter().map(Vec::len).sum();
    if total > limits.max_request_tokens as usize {
        return too_large(format!("{total} tokens exceed {} of one request", limits.max_request_tokens));
    }
    for (index, sequence) in sequences.iter().enumerate() {
        let what = format!("sequences[{index}]");
        if sequence.is_empty() {
            return invalid(format!("{what} is empty"));
        }
        if sequence.len() > limits.max_model_len as usize {
            return too_large(format!("{what} has {} tokens, more than {}", sequence.len(), limits.max_model_len));
        }
        tokens(&what, sequence, model)?;
    }
    Ok(())
}

/// Taps that exist, each once.
pub(super) fn taps(taps: &Taps, model: &ModelDescription) -> Checked {
    if taps.count() == 0 {
        return invalid("taps: name layers, or set final".to_owned());
    }
    for (place, layer) in taps.layers.iter().enumerate() {
        if *layer > model.num_hidden_layers {
            return invalid(format!("taps.layers holds {layer}, the base has {} layers", model.num_hidden_layers));
        }
        if taps.layers[..place].contains(layer) {
            return invalid(format!("taps.layers holds {layer} twice"));
        }
    }
    Ok(())
}

/// Rows of a loss; their shapes are checked where they are decoded.
pub(super) fn loss(request: &LossRequest, model: &ModelDescription) -> Checked {
    let (rows, most) = (request.rows(), model.limits.max_request_tokens as usize);
    if rows > most {
        return too_large(format!("{rows} rows exceed {most}"));
    }
    request.targets.as_ref().map_or(Ok(()), |targets| tokens("targets", targets, model))
}

/// A sequence that is followed, to where it may go.
pub(super) fn follow(request: &FollowRequest, model: &ModelDescription) -> Checked {
    let FollowRequest { prompt, max_tokens, taps: read } = request;
    taps(read, model)?;
    if prompt.is_empty() {
        return invalid("prompt is empty".to_owned());
    }
    let (whole, longest) = (prompt.len() as u64 + u64::from(*max_tokens), model.limits.max_model_len);
    if whole > longest.into() {
        return too_large(format!("prompt and max_tokens are {whole} tokens, more than {longest}"));
    }
    tokens("prompt", prompt, model)
}

/// Prompt and parameters of an answer.
pub(super) fn generate(request: &GenerateRequest, model: &ModelDescription) -> Checked {
    let longest = model.limits.max_model_len as usize;
    let least = request.prompt.len() + usize::from(request.max_tokens > 0);
    if request.prompt.is_empty() {
        return invalid("prompt is empty".to_owned());
    }
    if least > longest {
        return too_large(format!("prompt has {} tokens: with the answer it exceeds {longest}", request.prompt.len()));
    }
    tokens("prompt", &request.prompt, model)?;
    if !(request.temperature.is_finite() && request.temperature >= 0.0) {
        return invalid(format!("temperature is {}, must be 0 or more", request.temperature));
    }
    if !(request.top_p > 0.0 && request.top_p <= 1.0) {
        return invalid(format!("top_p is {}, must be above 0 and at most 1", request.top_p));
    }
    if let Some(alpha) = request.alpha.filter(|alpha| !alpha.is_finite()) {
        return invalid(format!("alpha is {alpha}"));
    }
    for (name, count) in [("logprobs", request.logprobs), ("prompt_logprobs", request.prompt_logprobs)] {
        if count.is_some_and(|count| count > MAX_LOGPROBS) {
            return invalid(format!("{name} is {}, must be at most {MAX_LOGPROBS}", count.unwrap_or_default()));
        }
    }
    sampling(&request.sampling, model)
}

fn sampling(sampling: &Sampling, model: &ModelDescription) -> Checked {
    let Sampling { logit_bias, repetition_penalty, frequency_penalty, presence_penalty, min_p, top_k: _ } = sampling;
    if logit_bias.len() > MAX_LOGIT_BIAS {
        return invalid(format!("sampling.logit_bias has {} entries, more than {MAX_LOGIT_BIAS}", logit_bias.len()));
    }
    let (biased, biases): (Vec<u32>, Vec<f32>) = logit_bias.iter().copied().unzip();
    tokens("sampling.logit_bias", &biased, model)?;
    // Far from where a sum would no longer be finite.
    let moves = biases.into_iter().chain([*frequency_penalty, *presence_penalty]).all(|number| number.abs() <= 1e3);
    if !moves || !(1e-3..=1e3).contains(repetition_penalty) {
        return invalid("sampling: a bias or penalty is beyond 1000, or repetition_penalty not between 0.001 and 1000".to_owned());
    }
    match (0.0..=1.0).contains(min_p) {
        true => Ok(()),
        false => invalid(format!("sampling.min_p is {min_p}, must be between 0 and 1")),
    }
}
