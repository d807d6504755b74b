//! Conversations as requests and training samples hold them: OpenAI's chat messages, read in one way for both.

use minijinja::Value;
use minijinja::value::ValueKind;
use serde::Deserialize;

/// Roles of a turn. `developer` is OpenAI's newer name of `system`, and is rendered as that.
const ROLES: &[&str] = &["system", "developer", "user", "assistant", "tool"];

/// What templates get by other ways.
const RESERVED: &[&str] =
    &["messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "bos_token", "eos_token", "chat_template"];
/// Members of `chat_template_kwargs`, and the bytes of a string in it.
const MAX_OPTIONS: usize = 32;
const MAX_OPTION_BYTES: usize = 4096;

/// Names under which clients send what the assistant thought, the first that is there counts: vLLM's and DeepSeek's, gpt-oss', OpenRouter's.
pub(super) const REASONING: &[&str] = &["reasoning_content", "thinking", "reasoning"];

/// What is wrong with a part of a content that is an image, say.
const NO_TEXT: &str = r#"must be {"type": "text", "text": …}: this model reads text only"#;

/// One turn of a chat.
#[derive(Clone, Debug, PartialEq)]
pub struct Message {
    /// `system`, `user`, `assistant` or `tool`.
    pub role: String,
    /// The text.
    pub content: String,
    /// Its other members (`tool_calls`, `name`, …), for templates that know them.
    pub others: Vec<(String, Value)>,
}

/// What a template renders.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Conversation {
    /// The turns.
    pub messages: Vec<Message>,
    /// Tools the model may call, as JSON schemas.
    pub tools: Vec<Value>,
    /// `chat_template_kwargs`, vLLM's and TRL's name: what the template reads beside them, such as `enable_thinking`.
    pub options: Vec<(String, Value)>,
}

/// What is wrong with a conversation, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The member, e.g. `messages[0].role`.
    pub place: String,
    /// What is wrong with it.
    pub problem: String,
}

impl Message {
    /// A turn that is text alone.
    pub fn new(role: &str, content: impl Into<String>) -> Self {
        Self { role: role.to_owned(), content: content.into(), others: Vec::new() }
    }

    fn read(value: &Value, place: &str) -> Result<Self, Fault> {
        let fault = |name: &str, problem: String| Fault { place: format!("{place}.{name}"), problem };
        if value.kind() != ValueKind::Map {
            return Err(Fault { place: place.to_owned(), problem: format!("is {}, not an object", kind(value)) });
        }
        let (mut role, mut content, mut others) = (None, None, Vec::new());
        for (name, value) in members(value) {
            match name.as_str() {
                "role" => role = Some(value),
                "content" => content = Some(value),
                "tool_calls" => {
                    // An empty list, as exports write it with every turn, is none.
                    let calls = tool_calls(&value, place)?;
                    others.extend((calls.len() != Some(0)).then_some((name, calls)));
                }
                _ => others.push((name, value)),
            }
        }
        let role = role.ok_or_else(|| fault("role", "is missing".to_owned()))?;
        let name = role.as_str().ok_or_else(|| fault("role", format!("is {}, not a string", kind(&role))))?;
        if !ROLES.contains(&name) {
            return Err(fault("role", format!("is {name:?}: it must be one of {}", ROLES.join(", "))));
        }
        let content = match content {
            Some(content) => text(&content, &format!("{place}.content"))?,
            // A turn that calls tools needs no words.
            None if others.iter().any(|(name, _)| name == "tool_calls") => String::new(),
            None => return Err(fault("content", "is missing".to_owned())),
        };
        Ok(Self { role: if name == "developer" { "system".to_owned() } else { name.to_owned() }, content, others })
    }

    /// Takes out what the turn says of what was thought before it: the members for it, and `<think>…</think>` where the content begins with that.
    pub fn drop_thinking(&mut self) {
        self.others.retain(|(name, _)| !REASONING.contains(&name.as_str()));
        let said = self.content.trim_start().strip_prefix("<think>").and_then(|rest| rest.split_once("</think>"));
        if let Some(said) = said.map(|(_, said)| said.trim_start().to_owned()) {
            self.content = said;
        }
    }

    /// The turn as a template sees it: what the assistant thought under both names that templates read, as transformers hands it to them.
    pub(super) fn to_value(&self) -> Value {
        let own = [("role", Value::from(self.role.as_str())), ("content", Value::from(self.content.as_str()))];
        let others = self.others.iter().map(|(name, value)| (name.as_str(), value.clone()));
        let thought = |name: &&str| self.others.iter().find(|(member, value)| member == name && !value.is_none()).map(|(_, value)| value);
        match REASONING.iter().find_map(thought) {
            Some(value) => {
                let [first, last] = ["thinking", "reasoning_content"].map(|name| (name, value.clone()));
                Value::from_pairs([first].into_iter().chain(own).chain(others).chain([last]))
            }
            None => Value::from_pairs(own.into_iter().chain(others)),
        }
    }
}

impl Conversation {
    /// Reads `messages`, `tools` and `chat_template_kwargs` of a JSON object; members that are null are absent.
    pub fn parse(json: &str) -> Result<Self, Fault> {
        #[derive(Deserialize)]
        struct Members {
            #[serde(default)]
            messages: Value,
            #[serde(default)]
            tools: Value,
            #[serde(default)]
            chat_template_kwargs: Value,
        }
        let Members { messages, tools, chat_template_kwargs } = serde_json::from_str(json)
            .map_err(|error| Fault { place: "messages".to_owned(), problem: format!("cannot be read: {error}") })?;
        let messages = read_messages(&messages, "messages")?;
        let tools = list(&without_nulls(&tools), "tools")?.unwrap_or_default();
        Ok(Self { messages, tools, options: options(&chat_template_kwargs)? })
    }

    /// Bytes of all texts in it, about.
    pub(super) fn size(&self) -> u64 {
        let mut bytes = 0;
        self.map(&mut |text| {
            bytes += text.len() as u64 + 16;
            String::new()
        });
        bytes
    }

    /// The conversation with every text in it changed: contents, and all strings in other members and tools.
    pub(super) fn map(&self, change: &mut dyn FnMut(&str) -> String) -> Self {
        let message = |message: &Message, change: &mut dyn FnMut(&str) -> String| Message {
            role: message.role.clone(),
            content: change(&message.content),
            others: message.others.iter().map(|(name, value)| (name.clone(), map(value, change))).collect(),
        };
        Self {
            messages: self.messages.iter().map(|turn| message(turn, change)).collect(),
            tools: self.tools.iter().map(|tool| map(tool, change)).collect(),
            options: self.options.iter().map(|(name, value)| (name.clone(), map(value, change))).collect(),
        }
    }
}

/// Reads a list of turns; `place` names it.
pub fn read_messages(messages: &Value, place: &str) -> Result<Vec<Message>, Fault> {
    let fault = |problem: &str| Fault { place: place.to_owned(), problem: problem.to_owned() };
    let messages = list(messages, place)?.ok_or_else(|| fault("is missing"))?;
    match messages.is_empty() {
        true => Err(fault("is empty")),
        false => messages.iter().enumerate().map(|(index, message)| Message::read(message, &format!("{place}[{index}]"))).collect(),
    }
}

/// What a template reads of [`Conversation::options`]: names of its own, with a boolean, a number or a short string.
fn options(value: &Value) -> Result<Vec<(String, Value)>, Fault> {
    let place = "chat_template_kwargs";
    let fault = |name: &str, problem: String| Fault { place: format!("{place}.{name}"), problem };
    match value.kind() {
        ValueKind::Undefined | ValueKind::None => return Ok(Vec::new()),
        ValueKind::Map => {}
        _ => return Err(Fault { place: place.to_owned(), problem: format!("is {}, not an object", kind(value)) }),
    }
    let options = members(value);
    if options.len() > MAX_OPTIONS {
        return Err(Fault { place: place.to_owned(), problem: format!("has {} members, more than {MAX_OPTIONS}", options.len()) });
    }
    for (name, value) in &options {
        if RESERVED.contains(&name.as_str()) {
            return Err(fault(name, "is a name that has its own place in a request".to_owned()));
        }
        let short = value.as_str().is_none_or(|text| text.len() <= MAX_OPTION_BYTES);
        if !short || !matches!(value.kind(), ValueKind::Bool | ValueKind::Number | ValueKind::String) {
            return Err(fault(name, format!("must be a boolean, a number or a string of at most {MAX_OPTION_BYTES} bytes")));
        }
    }
    Ok(options)
}

/// A content: a string, or a list of text parts, which are joined as they are.
fn text(content: &Value, place: &str) -> Result<String, Fault> {
    let fault = |place: String, problem: String| Fault { place, problem };
    match content.kind() {
        ValueKind::String => Ok(content.as_str().unwrap_or_default().to_owned()),
        ValueKind::Seq => {
            let wrong = |index: usize| fault(format!("{place}[{index}]"), NO_TEXT.to_owned());
            items(content).iter().enumerate().map(|(index, part)| text_part(part).ok_or_else(|| wrong(index))).collect()
        }
        _ => Err(fault(place.to_owned(), format!("is {}, not a string or a list of text parts", kind(content)))),
    }
}

fn text_part(part: &Value) -> Option<String> {
    let member = |name: &str| part.get_attr(name).ok()?.as_str().map(str::to_owned);
    member("text").filter(|_| member("type").is_some_and(|kind| kind == "text"))
}

/// Templates want a call's arguments as an object; OpenAI's API holds them as JSON in a string.
fn tool_calls(calls: &Value, place: &str) -> Result<Value, Fault> {
    let place = format!("{place}.tool_calls");
    let fault = |index: usize| Fault { place: format!("{place}[{index}].function.arguments"), problem: "is no JSON object".to_owned() };
    let calls = list(calls, &place)?.unwrap_or_default();
    calls.iter().enumerate().map(|(index, called)| call(called).ok_or_else(|| fault(index))).collect()
}

/// A call, or the `function` in it, with its `arguments` read.
fn call(called: &Value) -> Option<Value> {
    let read = |(name, value): (String, Value)| {
        let value = match (name.as_str(), value.as_str()) {
            ("function", None) => call(&value)?,
            ("arguments", Some("")) => Value::from_pairs([("", ""); 0]),
            ("arguments", Some(json)) => serde_json::from_str(json).ok().filter(|value: &Value| value.kind() == ValueKind::Map)?,
            _ => value,
        };
        Some((name, value))
    };
    members(called).into_iter().map(read).collect::<Option<Vec<_>>>().map(Value::from_pairs)
}

/// The items of a list; None for null or nothing.
fn list(value: &Value, place: &str) -> Result<Option<Vec<Value>>, Fault> {
    match value.kind() {
        ValueKind::Undefined | ValueKind::None => Ok(None),
        ValueKind::Seq => Ok(Some(items(value))),
        _ => Err(Fault { place: place.to_owned(), problem: format!("is {}, not an array", kind(value)) }),
    }
}

fn items(value: &Value) -> Vec<Value> {
    value.try_iter().into_iter().flatten().collect()
}

/// The members of an object that are not null, in their order.
fn members(value: &Value) -> Vec<(String, Value)> {
    let member = |name: Value| Some((name.as_str()?.to_owned(), value.get_item(&name).ok()?));
    items(value).into_iter().filter_map(member).filter(|(_, value)| !value.is_none()).collect()
}

/// What exports of tables put into every object for members that only some have.
fn without_nulls(value: &Value) -> Value {
    match value.kind() {
        ValueKind::Seq => items(value).iter().map(without_nulls).collect(),
        ValueKind::Map => Value::from_pairs(members(value).into_iter().map(|(name, value)| (name, without_nulls(&value)))),
        _ => value.clone(),
    }
}

fn map(value: &Value, change: &mut dyn FnMut(&str) -> String) -> Value {
    match (value.kind(), value.as_str()) {
        (_, Some(text)) => Value::from(change(text)),
        (ValueKind::Seq, _) => items(value).iter().map(|item| map(item, change)).collect(),
        (ValueKind::Map, _) => {
            let pairs: Vec<_> = members(value).into_iter().map(|(name, value)| (change(&name), map(&value, change))).collect();
            Value::from_pairs(pairs)
        }
        _ => value.clone(),
    }
}

fn kind(value: &Value) -> &'static str {
    match value.kind() {
        ValueKind::Bool => "a boolean",
        ValueKind::Number => "a number",
        ValueKind::String => "a string",
        ValueKind::Seq => "an array",
        ValueKind::Map => "an object",
        _ => "null",
    }
}
