//! The members of a request body, taken one by one with their types; what is left over is refused by name.

use std::ops::RangeInclusive;

use serde_json::{Map, Value};

use super::error::ApiError;

/// Parameters of OpenAI's API that we know and do not support, each with the value that asks for nothing.
const UNSUPPORTED: &[(&str, &str)] = &[
    ("suffix", "\"\""),
    ("response_format", r#"{"type":"text"}"#),
    ("tools", "[]"),
    ("tool_choice", "\"none\""),
    ("parallel_tool_calls", "true"),
    ("functions", "[]"),
    ("function_call", "\"none\""),
    ("modalities", r#"["text"]"#),
    ("audio", "null"),
    ("prediction", "null"),
    ("reasoning_effort", "null"),
    ("verbosity", "null"),
    ("web_search_options", "null"),
    ("store", "false"),
];

/// Hints of OpenAI's API that change no answer: who asks, where its prompt may be cached, how urgent it is, what it belongs to.
/// They are taken and not looked at, but for their type.
const HINTS: &[(&str, IsTyped)] = &[
    ("user", Value::is_string),
    ("safety_identifier", Value::is_string),
    ("prompt_cache_key", Value::is_string),
    ("prompt_cache_retention", Value::is_string),
    ("service_tier", Value::is_string),
    ("metadata", Value::is_object),
];

type IsTyped = fn(&Value) -> bool;

/// The members of a request that nobody has taken yet.
pub(super) struct Parameters(Map<String, Value>);

impl Parameters {
    /// Reads a JSON object.
    pub(super) fn parse(body: &[u8]) -> Result<Self, ApiError> {
        match serde_json::from_slice(body) {
            Ok(Value::Object(members)) => Ok(Self(members)),
            Ok(_) => Err(ApiError::request("The request body must be a JSON object.")),
            Err(error) => Err(ApiError::request(format!("The request body is not JSON: {error}."))),
        }
    }

    /// A member of any type; null is absent.
    pub(super) fn take(&mut self, name: &str) -> Option<Value> {
        self.0.remove(name).filter(|value| !value.is_null())
    }

    /// A text.
    pub(super) fn text(&mut self, name: &str) -> Result<Option<String>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => Err(ApiError::parameter(name, format!("{name} must be a string."))),
        }
    }

    /// True or false; false when absent.
    pub(super) fn flag(&mut self, name: &str) -> Result<bool, ApiError> {
        self.flag_or(name, false)
    }

    /// True or false, with a value for when it is absent.
    pub(super) fn flag_or(&mut self, name: &str, absent: bool) -> Result<bool, ApiError> {
        match self.take(name) {
            None => Ok(absent),
            Some(Value::Bool(flag)) => Ok(flag),
            Some(_) => Err(ApiError::parameter(name, format!("{name} must be true or false."))),
        }
    }

    /// A number within `range`.
    pub(super) fn number(&mut self, name: &str, range: RangeInclusive<f64>) -> Result<Option<f64>, ApiError> {
        let Some(value) = self.take(name) else { return Ok(None) };
        let number = value.as_f64().filter(|number| range.contains(number));
        let refusal = || ApiError::parameter(name, format!("{name} must be a number between {} and {}.", range.start(), range.end()));
        number.map(Some).ok_or_else(refusal)
    }

    /// An integer within `range`.
    pub(super) fn integer(&mut self, name: &str, range: RangeInclusive<i64>) -> Result<Option<i64>, ApiError> {
        let Some(value) = self.take(name) else { return Ok(None) };
        let number = value.as_i64().filter(|number| range.contains(number));
        let refusal = || ApiError::parameter(name, format!("{name} must be an integer between {} and {}.", range.start(), range.end()));
        number.map(Some).ok_or_else(refusal)
    }

    /// Refuses everything that was not taken and is no hint: unsupported parameters that ask for something, and unknown ones.
    pub(super) fn finish(self) -> Result<(), ApiError> {
        for (name, value) in self.0 {
            match HINTS.iter().find(|(hint, _)| *hint == name) {
                Some((_, fits)) if value.is_null() || fits(&value) => continue,
                Some(_) => return Err(ApiError::parameter(&name, format!("{name} has another type than in OpenAI's API."))),
                None => {}
            }
            match UNSUPPORTED.iter().find(|(unsupported, _)| *unsupported == name) {
                None => return Err(ApiError::parameter(&name, format!("Unrecognized request argument supplied: {name}."))),
                Some((_, nothing)) if asks_for_something(&value, nothing) => {
                    return Err(ApiError::parameter(&name, format!("{name} is not supported by this endpoint: leave it out.")));
                }
                Some(_) => {}
            }
        }
        Ok(())
    }
}

fn asks_for_something(value: &Value, nothing: &str) -> bool {
    let nothing: Value = serde_json::from_str(nothing).unwrap_or_default();
    !value.is_null() && *value != nothing
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn refusal(body: &str) -> Option<(Value, Value)> {
        let error = Parameters::parse(body.as_bytes()).and_then(Parameters::finish).err()?.body();
        Some((error["error"]["param"].clone(), error["error"]["message"].clone()))
    }

    #[test]
    fn every_unsupported_parameter_is_refused_by_name_unless_it_asks_for_nothing() {
        for (name, nothing) in UNSUPPORTED {
            assert_eq!(refusal(&format!("{{{name:?}: {nothing}}}")), None, "{name}");
            assert_eq!(refusal(&format!("{{{name:?}: null}}")), None, "{name}");
            let (parameter, message) = refusal(&format!("{{{name:?}: [7.5]}}")).unwrap();
            assert_eq!(parameter, *name);
            assert!(message.as_str().unwrap().starts_with(&format!("{name} is not supported")), "{message}");
        }
        assert_eq!(refusal(r#"{"suffix": "x"}"#).unwrap().0, "suffix");
    }

    // The types are those of openai-python's CompletionCreateParams.
    #[test]
    fn hints_that_change_no_answer_are_taken() {
        for (name, hint) in [
            ("user", json!("anna")),
            ("safety_identifier", json!("5f4dcc3b")),
            ("prompt_cache_key", json!("tenant-7")),
            ("prompt_cache_retention", json!("24h")),
            ("service_tier", json!("priority")),
            ("metadata", json!({"topic": "demo"})),
        ] {
            assert_eq!(refusal(&json!({name: hint}).to_string()), None, "{name}");
            assert_eq!(refusal(&json!({name: null}).to_string()), None, "{name}");
            assert_eq!(refusal(&json!({name: 7}).to_string()).unwrap().0, name);
        }
        assert_eq!(HINTS.len(), 6, "each hint is in the list above");
    }

    #[test]
    fn unknown_parameters_are_refused_by_name() {
        assert_eq!(
            refusal(r#"{"temprature": 1}"#).unwrap(),
            ("temprature".into(), "Unrecognized request argument supplied: temprature.".into())
        );
        assert_eq!(refusal("[]").unwrap().0, Value::Null);
        assert!(refusal("{").unwrap().1.as_str().unwrap().starts_with("The request body is not JSON"));
    }

    #[test]
    fn a_member_of_the_wrong_type_is_refused_by_name() {
        let mut parameters = Parameters::parse(br#"{"a": "x", "b": 1.5, "c": 3, "d": null, "e": 1}"#).unwrap();
        assert_eq!(parameters.number("a", 0.0..=2.0).unwrap_err().body()["error"]["message"], "a must be a number between 0 and 2.");
        assert_eq!(parameters.integer("b", 0..=2).unwrap_err().body()["error"]["param"], "b");
        assert!(parameters.integer("c", 0..=2).is_err());
        assert_eq!(parameters.text("d"), Ok(None));
        assert!(parameters.flag("e").is_err());
        assert_eq!(parameters.finish(), Ok(()));
    }
}
