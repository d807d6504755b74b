//! `POST /v1/chat/completions`.

use std::sync::Arc;

use serde_json::{Value, json};

use super::answer::{Piece, Token};
use super::error::ApiError;
use super::gateway::Gateway;
use super::parameters::Parameters;
use super::request::{Asked, Common};
use super::respond::{Completion, Shape, short};
use crate::exchange::wire::{MAX_LOGPROBS, TokenLogprob};
use crate::text::{self, ChatTemplate, Conversation, Ending, Message, Tokenizer};

/// Most turns of a chat.
const MAX_MESSAGES: usize = 4096;

/// Reads and checks a request.
pub(super) fn parse(asked: Asked<'_>, gateway: &Gateway) -> Result<Completion<Chat>, ApiError> {
    let Asked { body, mut parameters, model } = asked;
    let common = Common::take(&mut parameters, model, gateway.model.vocab_size)?;
    let without = || ApiError::request("The base model has no chat template: use /v1/completions.");
    let template = gateway.template.as_ref().ok_or_else(without)?;
    let conversation = conversation(body, template)?;
    parameters.take("messages");
    parameters.take("chat_template_kwargs");
    let tools = parameters.take("tools").is_some() && !conversation.tools.is_empty();
    if tools && parameters.take("tool_choice") != Some("none".into()) {
        let message = "tools goes with tool_choice: \"none\": the model is told of them, but calls are not read out of its answers.";
        return Err(ApiError::parameter("tools", message));
    }
    let ending = ending(&mut parameters)?;
    let newer = parameters.integer("max_completion_tokens", 1..=u32::MAX.into())?;
    let older = parameters.integer("max_tokens", 1..=u32::MAX.into())?;
    let logprobs = parameters.flag("logprobs")?;
    let top = parameters.integer("top_logprobs", 0..=MAX_LOGPROBS.into())?;
    parameters.finish()?;
    if top.is_some() && !logprobs {
        return Err(ApiError::parameter("top_logprobs", "top_logprobs goes with logprobs: true."));
    }
    // A head is asked as it was trained. The base alone was trained by nobody here: to it, contents are text.
    let split_special_tokens = common.model.head.as_ref().is_none_or(|head| head.artifact.shape.split_special_tokens);
    let prompt = text::Chat::new(&gateway.tokenizer, template, &conversation, split_special_tokens)?.prompt(ending)?;
    let wanted = newer.or(older).and_then(|tokens| u32::try_from(tokens).ok());
    let mut request = common.generate(gateway, prompt, wanted, "messages")?;
    request.logprobs = logprobs.then_some(top.unwrap_or(0) as u32);
    Completion::new(common, vec![(request, Chat { tokenizer: gateway.tokenizer.clone(), logprobs })])
}

/// Token ids of a conversation as a whole: `messages` and `tools` of a request, up to the end of the last turn.
pub(super) fn whole(body: &[u8], parameters: &mut Parameters, gateway: &Gateway, split_special_tokens: bool) -> Result<Vec<u32>, ApiError> {
    let without = || ApiError::request("The base model has no chat template: send input.");
    let template = gateway.template.as_ref().ok_or_else(without)?;
    let conversation = conversation(body, template)?;
    parameters.take("chat_template_kwargs");
    parameters.take("tools");
    Ok(text::Chat::new(&gateway.tokenizer, template, &conversation, split_special_tokens)?.prompt(Ending::Closed)?)
}

/// `messages` and `tools` of a request, from its text: templates print members in the order of the client.
fn conversation(body: &[u8], template: &ChatTemplate) -> Result<Conversation, ApiError> {
    let refusal = |place: &str, problem: &str| ApiError::parameter(place, format!("{place} {problem}."));
    let read = Conversation::parse(&String::from_utf8_lossy(body));
    let mut conversation = read.map_err(|fault| refusal(&fault.place, &fault.problem))?;
    if conversation.messages.len() > MAX_MESSAGES {
        return Err(refusal("messages", &format!("must be a list of 1 to {MAX_MESSAGES} messages")));
    }
    let Conversation { messages, tools, options } = &mut conversation;
    if let Some((name, _)) = options.iter().find(|(name, _)| !template.knows(name, tools)) {
        let nothing = "is nothing that this model's chat template looks at: leave it out";
        return Err(refusal(&format!("chat_template_kwargs.{name}"), nothing));
    }
    if !tools.is_empty() && !template.knows("tools", tools) {
        return Err(refusal("tools", "is nothing that this model's chat template has a place for: leave it out"));
    }
    for (index, message) in messages.iter_mut().enumerate() {
        let Message { role, others, .. } = message;
        // A client sends back what it got: members that are null or empty say nothing. It must send the call's id with an answer, and may
        // name who speaks; both are nothing to a template that tells turns apart by their order and role.
        let beside = |name: &str| name == "name" || (name == "tool_call_id" && role == "tool");
        others.retain(|(name, value)| value.len() != Some(0) && (!beside(name) || template.knows(name, tools)));
        if let Some((name, _)) = others.iter().find(|(name, _)| !template.knows(name, tools)) {
            return Err(refusal(&format!("messages[{index}].{name}"), "is not supported by this endpoint: leave it out"));
        }
    }
    Ok(conversation)
}

/// How the prompt ends, in the words of vLLM and transformers and with their defaults.
fn ending(parameters: &mut Parameters) -> Result<Ending, ApiError> {
    let goes_on = parameters.flag("continue_final_message")?;
    match (goes_on, parameters.flag_or("add_generation_prompt", true)?) {
        (false, true) => Ok(Ending::GenerationPrompt),
        (false, false) => Ok(Ending::Closed),
        (true, false) => Ok(Ending::FinalMessage),
        (true, true) => {
            Err(ApiError::parameter("continue_final_message", "continue_final_message goes with add_generation_prompt: false."))
        }
    }
}

/// Answers as chat completions.
#[derive(Clone)]
pub(super) struct Chat {
    tokenizer: Arc<Tokenizer>,
    logprobs: bool,
}

impl Shape for Chat {
    const ID: &'static str = "chatcmpl";
    const WHOLE: &'static str = "chat.completion";
    const CHUNK: &'static str = "chat.completion.chunk";

    fn opening(&mut self, _prompt: &[Option<TokenLogprob>]) -> Option<Value> {
        Some(json!({"delta": {"role": "assistant", "content": ""}, "logprobs": null, "finish_reason": null}))
    }

    fn piece(&self, piece: &Piece) -> Value {
        json!({"delta": {"content": piece.text}, "logprobs": self.logprobs(&piece.tokens), "finish_reason": null})
    }

    fn ending(&self, finish_reason: &str) -> Value {
        json!({"delta": {}, "logprobs": null, "finish_reason": finish_reason})
    }

    fn whole(&self, _prompt: &[Option<TokenLogprob>], piece: Piece, finish_reason: &str) -> Value {
        let message = json!({"role": "assistant", "content": piece.text, "refusal": null});
        json!({"message": message, "logprobs": self.logprobs(&piece.tokens), "finish_reason": finish_reason})
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
        let template = ChatTemplate::new("{% for m in messages %}{{ m.role }}{{ m.content }}{% endfor %}", None, None, None).unwrap();
        let read = conversation(format!(r#"{{"messages": {text}}}"#).as_bytes(), &template);
        let turns = read.map_err(|error| error.body()["error"]["param"].clone())?.messages;
        Ok(turns.into_iter().map(|turn| (turn.role, turn.content)).collect())
    }

    #[test]
    fn messages_hold_text_alone_or_in_parts() {
        let text = r#"[{"role":"user","content":"a"},{"role":"assistant","content":[{"type":"text","text":"b"},{"type":"text","text":"c"}],"refusal":null,"annotations":[]}]"#;
        assert_eq!(read(text).unwrap(), [("user".into(), "a".into()), ("assistant".into(), "bc".into())]);
        assert_eq!(read(r#"[{"role":"developer","content":"a"}]"#).unwrap(), [("system".into(), "a".into())], "OpenAI's newer name");
        for (wrong, place) in [
            ("[]", "messages"),
            ("null", "messages"),
            ("\"hi\"", "messages"),
            ("[1]", "messages[0]"),
            (r#"[{"content":"a"}]"#, "messages[0].role"),
            (r#"[{"role":"user","content":"a"},{"role":"user"}]"#, "messages[1].content"),
            (r#"[{"role":"user","content":[{"type":"text","text":"a"},{"type":"image_url","image_url":{}}]}]"#, "messages[0].content[1]"),
            (r#"[{"role":"assistant","content":"a","tool_calls":[{}]}]"#, "messages[0].tool_calls"),
            (r#"[{"role":"assistant","content":"a"},{"role":"human","content":"a"}]"#, "messages[1].role"),
            (r#"[{"role":"User","content":"a"}]"#, "messages[0].role"),
            (r#"[{"role":"user","content":"a","weight":0}]"#, "messages[0].weight"),
        ] {
            assert_eq!(read(wrong).unwrap_err(), place, "{wrong}");
        }
    }

    #[test]
    fn a_template_that_knows_tools_and_calls_gets_them_and_another_one_refuses_them() {
        let body = br#"{"tools":[{"z":1,"a":2}],"messages":[{"role":"user","content":"a"},{"role":"assistant","content":null,"tool_calls":[{"function":{"name":"f","arguments":"{}"}}]}]}"#;
        let template = |text| ChatTemplate::new(text, None, None, None).unwrap();
        let knows = template("{{ tools | tojson }}{% for m in messages %}{{ m.content }}{{ m.tool_calls | tojson }}{% endfor %}");
        let Conversation { messages, tools, .. } = conversation(body, &knows).unwrap();
        assert_eq!(serde_json::to_string(&tools).unwrap(), r#"[{"z":1,"a":2}]"#, "in the client's order");
        assert_eq!(messages[1].others.len(), 1);
        let place = |text| conversation(body, &template(text)).unwrap_err().body()["error"]["param"].clone();
        assert_eq!((place("{{ messages }}"), place("{{ tools }}")), (json!("tools"), json!("messages[1].tool_calls")));
    }

    #[test]
    fn the_id_of_a_call_and_a_name_are_for_templates_that_know_them() {
        let turns = |text, body: &str| conversation(body.as_bytes(), &ChatTemplate::new(text, None, None, None).unwrap());
        let body = r#"{"messages":[{"role":"user","name":"eve","content":"a"},{"role":"tool","tool_call_id":"1","content":"b"}]}"#;
        let qwen = "{% for m in messages %}{% if m.role == 'tool' %}user<tool_response>{{ m.content }}</tool_response>{% else %}{{ m.role }}{{ m.content }}{% endif %}{% endfor %}";
        let without = turns(qwen, body).unwrap().messages;
        assert!(without.iter().all(|turn| turn.others.is_empty()), "{without:?}");
        let with = turns("{% for m in messages %}{{ m.name }}{{ m.tool_call_id }}{{ m.content }}{% endfor %}", body).unwrap().messages;
        let names: Vec<_> = with.iter().flat_map(|turn| &turn.others).map(|(name, _)| &**name).collect();
        assert_eq!(names, ["name", "tool_call_id"]);
        let misplaced = r#"{"messages":[{"role":"user","tool_call_id":"1","content":"b"}]}"#;
        assert_eq!(turns(qwen, misplaced).unwrap_err().body()["error"]["param"], "messages[0].tool_call_id");
    }

    #[test]
    fn switches_of_a_template_are_for_templates_that_know_them() {
        let read = |options: &str| {
            let template = ChatTemplate::new("{{ enable_thinking }}{{ effort }}", None, None, None).unwrap();
            let body = format!(r#"{{"messages": [{{"role": "user", "content": "a"}}], "chat_template_kwargs": {options}}}"#);
            conversation(body.as_bytes(), &template).map(|read| read.options.len()).map_err(|error| error.body()["error"]["param"].clone())
        };
        assert_eq!(read(r#"{"enable_thinking": false, "effort": "low"}"#), Ok(2));
        assert_eq!((read("null"), read("{}"), read(r#"{"effort": null}"#)), (Ok(0), Ok(0), Ok(0)));
        for (wrong, place) in [
            ("[]", "chat_template_kwargs"),
            (r#"{"thinking": true}"#, "chat_template_kwargs.thinking"),
            (r#"{"effort": {}}"#, "chat_template_kwargs.effort"),
            (r#"{"messages": "a"}"#, "chat_template_kwargs.messages"),
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
        assert_eq!(chat.piece(&piece), json!({"delta": {"content": "hello"}, "logprobs": logprobs, "finish_reason": null}));
        let message = json!({"role": "assistant", "content": "hello", "refusal": null});
        assert_eq!(chat.whole(&[], piece, "stop"), json!({"message": message, "logprobs": logprobs, "finish_reason": "stop"}));
    }
}
