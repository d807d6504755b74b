//! `POST /v1/completions`.

use std::sync::Arc;

use serde_json::{Map, Value, json};

use super::answer::{Piece, Token};
use super::error::ApiError;
use super::gateway::Gateway;
use super::request::{Asked, Common, MAX_CHOICES};
use super::respond::{Completion, Shape, short};
use crate::exchange::wire::{MAX_LOGPROBS, TokenLogprob};
use crate::text::{DecodeStream, Tokenizer};

/// Tokens of an answer when the request does not say, as in OpenAI's API.
const DEFAULT_MAX_TOKENS: i64 = 16;

/// Reads and checks a request.
pub(super) fn parse(asked: Asked<'_>, gateway: &Gateway) -> Result<Completion<Text>, ApiError> {
    let Asked { mut parameters, model, .. } = asked;
    let common = Common::take(&mut parameters, model, gateway.model.vocab_size)?;
    let prompts = prompts(parameters.take("prompt"), &gateway.tokenizer, gateway.model.vocab_size)?;
    let max_tokens = parameters.integer("max_tokens", 0..=u32::MAX.into())?.unwrap_or(DEFAULT_MAX_TOKENS);
    let logprobs = parameters.integer("logprobs", 0..=MAX_LOGPROBS.into())?.map(|count| count as u32);
    let echo = parameters.flag("echo")?;
    parameters.finish()?;
    let one = |prompt: Prompt| {
        let mut request = common.generate(gateway, prompt.ids, u32::try_from(max_tokens).ok(), &prompt.name)?;
        request.logprobs = logprobs;
        request.prompt_logprobs = match (echo, logprobs, max_tokens) {
            (true, Some(count), _) => Some(count),
            // A prompt that is not continued is scored: the pool has no other use for it.
            (_, _, 0) => Some(0),
            _ => None,
        };
        // As in vLLM, an end of which log probabilities are told is among them: who scores a text by its last tokens counts on it.
        let ends = logprobs.map(|_| std::mem::take(&mut request.stop_token_ids)).unwrap_or_default();
        let echo = echo.then(|| Echo { ids: request.prompt.clone(), hidden: prompt.hidden });
        Ok((request, Text { tokenizer: gateway.tokenizer.clone(), logprobs: logprobs.is_some(), ends, echo, echoed: 0 }))
    };
    let prompts: Result<Vec<_>, ApiError> = prompts.into_iter().map(one).collect();
    Completion::new(common, prompts?)
}

struct Prompt {
    /// What errors call it.
    name: String,
    ids: Vec<u32>,
    /// Tokens at its beginning that the tokenizer added to the client's text.
    hidden: usize,
}

/// One prompt, or a list of them.
fn prompts(value: Option<Value>, tokenizer: &Tokenizer, vocab_size: u32) -> Result<Vec<Prompt>, ApiError> {
    let refusal = |message: &str| Err(ApiError::parameter("prompt", message));
    match value {
        Some(Value::Array(prompts)) if prompts.first().is_some_and(|first| !first.is_number()) => {
            if prompts.len() > MAX_CHOICES {
                return refusal(&format!("prompt has {} prompts, more than {MAX_CHOICES}.", prompts.len()));
            }
            let one = |(index, value)| prompt(value, format!("prompt[{index}]"), tokenizer, vocab_size);
            prompts.into_iter().enumerate().map(one).collect()
        }
        Some(value) => Ok(vec![prompt(value, "prompt".to_owned(), tokenizer, vocab_size)?]),
        None => refusal("prompt must be a text or a list of token ids, or a list of these."),
    }
}

fn prompt(value: Value, name: String, tokenizer: &Tokenizer, vocab_size: u32) -> Result<Prompt, ApiError> {
    let refusal = |message: &str| ApiError::parameter(&name, format!("{name} {message}."));
    let (ids, hidden) = match value {
        Value::String(text) => {
            let ids = tokenizer.encode(&text, true)?;
            let added =
                ids.first().filter(|first| tokenizer.is_special(**first) && !text.as_bytes().starts_with(tokenizer.token_bytes(**first)));
            let hidden = usize::from(added.is_some());
            (ids, hidden)
        }
        Value::Array(ids) if ids.iter().all(Value::is_u64) => {
            let id = |id: &Value| id.as_u64().filter(|id| *id < vocab_size.into()).map(|id| id as u32);
            let ids: Option<Vec<u32>> = ids.iter().map(id).collect();
            (ids.ok_or_else(|| refusal(&format!("has a token id that is not below {vocab_size}")))?, 0)
        }
        _ => return Err(refusal("must be a text or a list of token ids")),
    };
    match ids.is_empty() {
        true => Err(refusal("is empty")),
        false => Ok(Prompt { name, ids, hidden }),
    }
}

#[derive(Clone)]
struct Echo {
    ids: Vec<u32>,
    hidden: usize,
}

/// Answers as text completions.
#[derive(Clone)]
pub(super) struct Text {
    tokenizer: Arc<Tokenizer>,
    logprobs: bool,
    ends: Vec<u32>,
    echo: Option<Echo>,
    /// Characters shown before the generated text.
    echoed: usize,
}

impl Shape for Text {
    const ID: &'static str = "cmpl";
    const WHOLE: &'static str = "text_completion";
    const CHUNK: &'static str = "text_completion";

    fn ends(&self) -> &[u32] {
        &self.ends
    }

    fn opening(&mut self, prompt: &[Option<TokenLogprob>]) -> Option<Value> {
        let piece = self.echo(prompt)?;
        let choice = self.choice(&piece.text, &piece.tokens, Value::Null);
        self.echoed = piece.text.chars().count();
        Some(choice)
    }

    fn piece(&self, piece: &Piece) -> Value {
        let tokens = self.shifted(&piece.tokens, self.echoed);
        self.choice(&piece.text, &tokens, Value::Null)
    }

    fn ending(&self, finish_reason: &str) -> Value {
        json!({"text": "", "logprobs": null, "finish_reason": finish_reason})
    }

    fn whole(&self, prompt: &[Option<TokenLogprob>], piece: Piece, finish_reason: &str) -> Value {
        let mut whole = self.echo(prompt).unwrap_or_default();
        let tokens = self.shifted(&piece.tokens, whole.text.chars().count());
        whole.append(Piece { text: piece.text, tokens });
        self.choice(&whole.text, &whole.tokens, finish_reason.into())
    }
}

impl Text {
    /// The prompt as the beginning of the answer, with control tokens as the client wrote them.
    fn echo(&self, prompt: &[Option<TokenLogprob>]) -> Option<Piece> {
        let Echo { ids, hidden } = self.echo.as_ref()?;
        let mut decoder = DecodeStream::new(&*self.tokenizer).with_control_tokens();
        let mut piece = Piece::default();
        let mut offset = 0;
        for (place, id) in ids.iter().enumerate() {
            let unknown = || TokenLogprob { token: *id, logprob: None, top: Vec::new() };
            let logprob = prompt.get(place).cloned().flatten().unwrap_or_else(unknown);
            let text = if place < *hidden { String::new() } else { decoder.push(*id) };
            piece.append(Piece { text: text.clone(), tokens: vec![Token { logprob, offset }] });
            offset += text.chars().count();
        }
        piece.text.push_str(&decoder.finish());
        Some(piece)
    }

    fn shifted(&self, tokens: &[Token], by: usize) -> Vec<Token> {
        tokens.iter().map(|token| Token { offset: token.offset + by, ..token.clone() }).collect()
    }

    fn choice(&self, text: &str, tokens: &[Token], finish_reason: Value) -> Value {
        json!({"text": text, "logprobs": self.logprobs(tokens), "finish_reason": finish_reason})
    }

    fn logprobs(&self, tokens: &[Token]) -> Value {
        if !self.logprobs {
            return Value::Null;
        }
        let names: Vec<String> = tokens.iter().map(|token| self.name(token.logprob.token)).collect();
        let logprobs: Vec<Value> = tokens.iter().map(|token| token.logprob.logprob.map_or(Value::Null, short)).collect();
        let offsets: Vec<usize> = tokens.iter().map(|token| token.offset).collect();
        let top: Vec<Value> = tokens.iter().map(|token| self.top(&token.logprob)).collect();
        json!({"tokens": names, "token_logprobs": logprobs, "top_logprobs": top, "text_offset": offsets})
    }

    fn top(&self, token: &TokenLogprob) -> Value {
        let Some(logprob) = token.logprob else { return Value::Null };
        let all = token.top.iter().copied().chain([(token.token, logprob)]);
        Value::Object(all.map(|(id, logprob)| (self.name(id), short(logprob))).collect::<Map<_, _>>())
    }

    /// A token's text, or OpenAI's notation for bytes that are none.
    fn name(&self, id: u32) -> String {
        let bytes = self.tokenizer.token_bytes(id);
        match std::str::from_utf8(bytes) {
            Ok(text) => text.to_owned(),
            Err(_) => bytes.iter().fold(String::from("bytes:"), |name, byte| format!("{name}\\x{byte:02x}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::answer::tests::{token, tokenizer};
    use super::*;

    fn text(echo: Option<Echo>) -> Text {
        Text { tokenizer: Arc::new(tokenizer()), logprobs: true, ends: Vec::new(), echo, echoed: 0 }
    }

    #[test]
    fn a_prompt_is_a_text_or_a_list_of_ids_and_there_may_be_several() {
        let read = |prompt: Value| {
            super::prompts(Some(prompt), &tokenizer(), 258)
                .map(|prompts| prompts.into_iter().map(|prompt| prompt.ids).collect::<Vec<_>>())
                .map_err(|error| error.body()["error"]["message"].as_str().unwrap().to_owned())
        };
        assert_eq!(read(json!("hello")).unwrap()[0].len(), 5, "no merges in this vocabulary");
        for (prompt, ids) in [
            (json!(["a"]), &[&[97][..]][..]),
            (json!([97, 256]), &[&[97, 256]]),
            (json!([[97]]), &[&[97]]),
            (json!(["a", "bc"]), &[&[97], &[98, 99]]),
            (json!([[1], [2, 3], [1]]), &[&[1], &[2, 3], &[1]]),
            (json!(["a", [2]]), &[&[97], &[2]]),
            (json!(vec!["a"; 128]), &[&[97][..]; 128]),
        ] {
            assert_eq!(read(prompt.clone()).unwrap(), ids, "{prompt}");
        }
        for (wrong, message) in [
            (json!([97, 258]), "prompt has a token id that is not below 258."),
            (json!([[97], [97, 258]]), "prompt[1] has a token id that is not below 258."),
            (json!(""), "prompt is empty."),
            (json!([]), "prompt is empty."),
            (json!(["a", ""]), "prompt[1] is empty."),
            (json!([[]]), "prompt[0] is empty."),
            (json!(vec!["a"; 129]), "prompt has 129 prompts, more than 128."),
            (json!(5), "prompt must be a text or a list of token ids."),
            (json!([1.5, 2]), "prompt must be a text or a list of token ids."),
            (json!([1, "a"]), "prompt must be a text or a list of token ids."),
            (json!(["a", 1]), "prompt[1] must be a text or a list of token ids."),
            (json!([["a"]]), "prompt[0] must be a text or a list of token ids."),
            (json!([null]), "prompt[0] must be a text or a list of token ids."),
        ] {
            assert_eq!(read(wrong.clone()).unwrap_err(), message, "{wrong}");
        }
    }

    #[test]
    fn echo_comes_first_with_offsets_that_go_on() {
        let mut text = text(Some(Echo { ids: vec![256, 0xC3, 0xA9], hidden: 0 }));
        let scored = [None, Some(token(0xC3)), Some(token(0xA9))];
        let piece = Piece { text: "a".into(), tokens: vec![Token { logprob: token(97), offset: 0 }] };
        let whole = text.whole(&scored, piece.clone(), "length");
        assert_eq!(whole["text"], "helloéa");
        assert_eq!(
            whole["logprobs"],
            json!({
                "tokens": ["hello", "bytes:\\xc3", "bytes:\\xa9", "a"],
                "token_logprobs": [null, -0.5, -0.5, -0.5],
                "top_logprobs": [null, {"bytes:\\xc3": -0.5}, {"bytes:\\xa9": -0.5}, {"a": -0.5}],
                "text_offset": [0, 5, 5, 6],
            })
        );
        let opening = text.opening(&scored).unwrap();
        let rest = text.piece(&piece);
        assert_eq!((&opening["text"], &rest["text"]), (&json!("helloé"), &json!("a")));
        assert_eq!(rest["logprobs"]["text_offset"], json!([6]));
    }

    #[test]
    fn a_token_the_tokenizer_added_is_scored_but_not_shown() {
        let text = text(Some(Echo { ids: vec![257, 97], hidden: 1 }));
        let whole = text.whole(&[None, Some(token(97))], Piece::default(), "length");
        assert_eq!(whole["text"], "a");
        assert_eq!(whole["logprobs"]["text_offset"], json!([0, 0]));
    }
}
