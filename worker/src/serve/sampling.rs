//! How a client wants tokens drawn, beside temperature and `top_p`.

use serde_json::{Map, Value};

use super::error::ApiError;
use super::parameters::Parameters;
use crate::exchange::wire::{MAX_LOGIT_BIAS, Sampling};

/// Takes the parameters out of a request: names and ranges are OpenAI's where it has them, else vLLM's.
pub(super) fn take(parameters: &mut Parameters, vocab_size: u32) -> Result<Sampling, ApiError> {
    let logit_bias = match parameters.take("logit_bias") {
        None => Vec::new(),
        Some(Value::Object(biases)) => logit_bias(&biases, vocab_size)?,
        Some(_) => return Err(ApiError::parameter("logit_bias", "logit_bias must be an object of token ids and numbers.")),
    };
    let mut number = |name, range, off| Ok::<_, ApiError>(parameters.number(name, range)?.unwrap_or(off) as f32);
    let (repetition_penalty, min_p) = (number("repetition_penalty", 0.01..=100.0, 1.0)?, number("min_p", 0.0..=1.0, 0.0)?);
    let [frequency_penalty, presence_penalty] =
        [number("frequency_penalty", -2.0..=2.0, 0.0)?, number("presence_penalty", -2.0..=2.0, 0.0)?];
    // -1 is off as well, as in vLLM.
    let top_k = parameters.integer("top_k", -1..=u32::MAX.into())?.map_or(0, |count| u32::try_from(count).unwrap_or(0));
    Ok(Sampling { logit_bias, repetition_penalty, frequency_penalty, presence_penalty, min_p, top_k })
}

fn logit_bias(biases: &Map<String, Value>, vocab_size: u32) -> Result<Vec<(u32, f32)>, ApiError> {
    let refusal = |message: String| ApiError::parameter("logit_bias", message);
    if biases.len() > MAX_LOGIT_BIAS {
        return Err(refusal(format!("logit_bias has {} tokens, more than {MAX_LOGIT_BIAS}.", biases.len())));
    }
    let one = |(token, bias): (&String, &Value)| {
        let id = token.parse().ok().filter(|id| *id < vocab_size);
        let id = id.ok_or_else(|| refusal(format!("logit_bias: {token:?} is no token id below {vocab_size}.")))?;
        let bias = bias.as_f64().filter(|bias| (-100.0..=100.0).contains(bias));
        let bias = bias.ok_or_else(|| refusal(format!("logit_bias of token {id} must be a number between -100 and 100.")))?;
        Ok((id, bias as f32))
    };
    biases.iter().map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(body: &str) -> Result<Sampling, (String, String)> {
        let mut parameters = Parameters::parse(body.as_bytes()).unwrap();
        let sampling = take(&mut parameters, 50).map_err(|error| {
            let text = |name: &str| error.body()["error"][name].as_str().unwrap().to_owned();
            (text("param"), text("message"))
        })?;
        parameters.finish().unwrap();
        Ok(sampling)
    }

    #[test]
    fn what_asks_for_nothing_is_nothing() {
        for body in [
            "{}",
            r#"{"logit_bias": {}, "repetition_penalty": 1, "frequency_penalty": 0, "presence_penalty": -0.0, "min_p": 0, "top_k": 0}"#,
            r#"{"logit_bias": null, "repetition_penalty": null, "top_k": -1, "min_p": null}"#,
        ] {
            assert!(read(body).unwrap().is_nothing(), "{body}");
        }
    }

    #[test]
    fn each_member_asks_for_what_it_says() {
        let sampling = |change: fn(&mut Sampling)| {
            let mut sampling = Sampling::default();
            change(&mut sampling);
            sampling
        };
        for (body, expected) in [
            (r#"{"logit_bias": {"49": -100, "0": 2.5}}"#, sampling(|s| s.logit_bias = vec![(0, 2.5), (49, -100.0)])),
            (r#"{"repetition_penalty": 1.25}"#, sampling(|s| s.repetition_penalty = 1.25)),
            (r#"{"frequency_penalty": -2}"#, sampling(|s| s.frequency_penalty = -2.0)),
            (r#"{"presence_penalty": 0.5}"#, sampling(|s| s.presence_penalty = 0.5)),
            (r#"{"min_p": 1}"#, sampling(|s| s.min_p = 1.0)),
            (r#"{"top_k": 40}"#, sampling(|s| s.top_k = 40)),
        ] {
            assert_eq!(read(body).unwrap(), expected, "{body}");
        }
    }

    #[test]
    fn what_is_out_of_range_is_refused_by_name() {
        let many: Vec<String> = (0..1025).map(|id| format!("\"{id}\": 1")).collect();
        let many = format!("{{\"logit_bias\": {{{}}}}}", many.join(","));
        for (body, name, word) in [
            (r#"{"logit_bias": {"50": 1}}"#, "logit_bias", "\"50\" is no token id below 50"),
            (r#"{"logit_bias": {"-1": 1}}"#, "logit_bias", "\"-1\" is no token id"),
            (r#"{"logit_bias": {"the": 1}}"#, "logit_bias", "\"the\" is no token id"),
            (r#"{"logit_bias": {"1": 100.5}}"#, "logit_bias", "token 1 must be a number between -100 and 100"),
            (r#"{"logit_bias": {"1": "5"}}"#, "logit_bias", "token 1 must be a number"),
            (r#"{"logit_bias": [[1, 5]]}"#, "logit_bias", "must be an object"),
            (many.as_str(), "logit_bias", "1025 tokens, more than 1024"),
            (r#"{"frequency_penalty": 2.5}"#, "frequency_penalty", "between -2 and 2"),
            (r#"{"presence_penalty": "1"}"#, "presence_penalty", "between -2 and 2"),
            (r#"{"repetition_penalty": 0}"#, "repetition_penalty", "between 0.01 and 100"),
            (r#"{"min_p": 1.5}"#, "min_p", "between 0 and 1"),
            (r#"{"top_k": -2}"#, "top_k", "between -1 and"),
            (r#"{"top_k": 1.5}"#, "top_k", "must be an integer"),
        ] {
            let (parameter, message) = read(body).unwrap_err();
            assert_eq!(parameter, name, "{body}");
            assert!(message.contains(word), "{body}: {message}");
        }
    }
}
