//! `POST /v1/chat/completions`.

use std::sync::Arc;

use serde_json::{Map, Value, json};

use super::answer::{Piece, Token};
use super::error::ApiError;
use super::gateway::Gateway;
use super::parameters::Parameters;
use super::request::{Common, Names};
use super::respond::{Completion, Shape, short};
use crate::exchange::wire::{MAX_LOGPROBS, TokenLogprob};
use crate::text::{Message, Tokenizer};

/// Most turns of a chat.
const MAX_MESSAGES: usize = 4096;

/// Reads and checks a request.
pub(super) fn parse(body: &[u8], gateway: &Gateway, names: &Names) -> Result<Completion<Chat>, ApiError> {
    let mut parameters = Parameters::parse(body)?;
    let common = Common::take(&mut parameters, names, &gateway.artifact.digest)?;
    let messages = messages(parameters.take("messages"))?;
    let newer = parameters.integer("max_completion_tokens", 1..=u32::MAX.into())?;
    let older = parameters.integer("max_tokens", 1..=u32::MAX.into())?;
    let logprobs = parameters.flag("logprobs")?;
    let top = parameters.integer("top_logprobs", 0..=MAX_LOGPROBS.into())?;
    parameters.finish()?;
    if top.is_some() && !logprobs {
        return Err(ApiError::parameter("top_logprobs", "top_logprobs goes with logprobs: true."));
    }
    let without = || ApiError::request("The base model has no chat template: use /v1/completions.");
    let rendered = gateway.template.as_ref().ok_or_else(without)?.render(&messages, true)?;
    let prompt = gateway.tokenizer.encode(&rendered, false)?;
    let wanted = newer.or(older).and_then(|tokens| u32::try_from(tokens).ok());
    let mut request = common.generate(gateway, prompt, wanted, "messages")?;
    request.logprobs = logprobs.then_some(top.unwrap_or(0) as u32);
    Ok(Completion { common, request, shape: Chat { tokenizer: gateway.tokenizer.clone(), logprobs } })
}

fn messages(value: Option<Value>) -> Result<Vec<Message>, ApiError> {
    let refusal = || ApiError::parameter("messages", format!("messages must be a list of 1 to {MAX_MESSAGES} messages."));
    let Some(Value::Array(messages)) = value else { return Err(refusal()) };
    if messages.is_empty() || messages.len() > MAX_MESSAGES {
        return Err(refusal());
    }
    let message = |(index, message)| match message {
        Value::Object(members) => self::message(members, &format!("messages[{index}]")),
        _ => Err(ApiError::parameter(format!("messages[{index}]"), format!("messages[{index}] must be an object."))),
    };
    messages.into_iter().enumerate().map(message).collect()
}

fn message(mut members: Map<String, Value>, place: &str) -> Result<Message, ApiError> {
    let refusal = |name: &str, must: &str| ApiError::parameter(format!("{place}.{name}"), format!("{place}.{name} {must}."));
    let Some(Value::String(role)) = members.remove("role") else { return Err(refusal("role", "must be a string")) };
    let content = match members.remove("content") {
        Some(Value::String(text)) => text,
        Some(Value::Array(parts)) => {
            parts.iter().enumerate().map(|(index, part)| text_part(part, &format!("{place}.content[{index}]"))).collect::<Result<_, _>>()?
        }
        _ => return Err(refusal("content", "must be a string or a list of text parts")),
    };
    // A client sends back what it got: members that are null or empty say nothing.
    let empty = |value: &Value| value.is_null() || value.as_array().is_some_and(Vec::is_empty);
    match members.iter().find(|(_, value)| !empty(value)) {
        Some((name, _)) => Err(refusal(name, "is not supported by this endpoint: leave it out")),
        None => Ok(Message { role, content }),
    }
}

fn text_part(part: &Value, place: &str) -> Result<String, ApiError> {
    match (part["type"].as_str(), part["text"].as_str()) {
        (Some("text"), Some(text)) => Ok(text.to_owned()),
        _ => Err(ApiError::parameter(place, format!("{place} must be {{\"type\": \"text\", \"text\": …}}: this model reads text only."))),
    }
}

/// Answers as chat completions.
pub(super) struct Chat {
    tokenizer: Arc<Tokenizer>,
    logprobs: bool,
}

impl Shape for Chat {
    const ID: &'static str = "chatcmpl";
    const WHOLE: &'static str = "chat.completion";
    const CHUNK: &'static str = "chat.completion.chunk";

    fn opening(&mut self, _prompt: &[Option<TokenLogprob>]) -> Option<Value> {
        Some(json!({"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": null, "finish_reason": null}))
    }

    fn piece(&self, piece: &Piece) -> Value {
        json!({"index": 0, "delta": {"content": piece.text}, "logprobs": self.logprobs(&piece.tokens), "finish_reason": null})
    }

    fn ending(&self, finish_reason: &str) -> Value {
        json!({"index": 0, "delta": {}, "logprobs": null, "finish_reason": finish_reason})
    }

    fn whole(&self, _prompt: &[Option<TokenLogprob>], piece: Piece, finish_reason: &str) -> Value {
        let message = json!({"role": "assistant", "content": piece.text, "refusal": null});
        json!({"index": 0, "message": message, "logprobs": self.logprobs(&piece.tokens), "finish_reason": finish_reason})
    }
}

impl Chat {
    fn logprobs(&self, tokens: &[Token]) -> Value {
        if !self.logprobs {
            return Value::Null;
        }
        let content = tokens.iter().map(|Token { logprob, .. }| {
            let mut entry = self.entry(logprob.token, logprob.logprob.unwrap_or_default());
            entry["top_logprobs"] = logprob.top.iter().map(|(id, logprob)| self.entry(*id, *logprob)).collect();
            entry
        });
        json!({"content": content.collect::<Vec<_>>(), "refusal": null})
    }

    fn entry(&self, id: u32, logprob: f32) -> Value {
        let bytes = self.tokenizer.token_bytes(id);
        json!({"token": String::from_utf8_lossy(bytes), "logprob": short(logprob), "bytes": bytes})
    }
}

#[cfg(test)]
mod tests {
    use super::super::answer::tests::{token, tokenizer};
    use super::*;

    fn read(text: &str) -> Result<Vec<(String, String)>, Value> {
        let turns = messages(serde_json::from_str(text).unwrap()).map_err(|error| error.body()["error"]["param"].clone())?;
        Ok(turns.into_iter().map(|turn| (turn.role, turn.content)).collect())
    }

    #[test]
    fn messages_hold_text_alone_or_in_parts() {
        let text = r#"[{"role":"user","content":"a"},{"role":"assistant","content":[{"type":"text","text":"b"},{"type":"text","text":"c"}],"refusal":null,"annotations":[]}]"#;
        assert_eq!(read(text).unwrap(), [("user".into(), "a".into()), ("assistant".into(), "bc".into())]);
        for (wrong, place) in [
            ("[]", "messages"),
            ("null", "messages"),
            ("\"hi\"", "messages"),
            ("[1]", "messages[0]"),
            (r#"[{"content":"a"}]"#, "messages[0].role"),
            (r#"[{"role":"user","content":"a"},{"role":"user"}]"#, "messages[1].content"),
            (r#"[{"role":"user","content":[{"type":"text","text":"a"},{"type":"image_url","image_url":{}}]}]"#, "messages[0].content[1]"),
            (r#"[{"role":"assistant","content":"a","tool_calls":[{}]}]"#, "messages[0].tool_calls"),
        ] {
            assert_eq!(read(wrong).unwrap_err(), place, "{wrong}");
        }
    }

    #[test]
    fn pieces_have_the_shape_of_openai() {
        let chat = Chat { tokenizer: Arc::new(tokenizer()), logprobs: true };
        let piece = Piece { text: "hello".into(), tokens: vec![Token { logprob: token(256), offset: 0 }] };
        let entry = json!({"token": "hello", "logprob": -0.5, "bytes": [104, 101, 108, 108, 111]});
        let mut with_top = entry.clone();
        with_top["top_logprobs"] = json!([entry]);
        let logprobs = json!({"content": [with_top], "refusal": null});
        assert_eq!(chat.piece(&piece), json!({"index": 0, "delta": {"content": "hello"}, "logprobs": logprobs, "finish_reason": null}));
        let message = json!({"role": "assistant", "content": "hello", "refusal": null});
        assert_eq!(chat.whole(&[], piece, "stop"), json!({"index": 0, "message": message, "logprobs": logprobs, "finish_reason": "stop"}));
    }
}
