//! What one line says, before tokens: format detection and field checks. Pure.

use carryon_crds::job::DataFormat;
use serde_json::{Map, Value};

/// One turn of a conversation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Turn {
    /// `system`, `user`, `assistant`, or what else the template knows.
    pub role: String,
    /// Text of the turn.
    pub content: String,
}

/// One line of a data file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Record {
    /// A conversation; the last turn is the assistant's and is learned.
    Chat(Vec<Turn>),
    /// Plain text, all of it learned.
    Text(String),
    /// A text and the name of its label.
    Labelled {
        /// The text.
        text: String,
        /// Label as written.
        label: String,
    },
    /// Token ids; those from `prompt_length` on are learned.
    Tokens {
        /// Token ids.
        input_ids: Vec<u32>,
        /// Tokens that are given.
        prompt_length: usize,
    },
}

/// The format of a line, by its fields. Never `Auto`.
pub fn detect(line: &str) -> Result<DataFormat, String> {
    let object = object(line)?;
    let has = |field: &str| object.contains_key(field);
    match () {
        () if has("messages") => Ok(DataFormat::Chat),
        () if has("prompt") && has("completion") => Ok(DataFormat::PromptCompletion),
        () if has("input_ids") => Ok(DataFormat::Tokenized),
        () if has("text") && has("label") => Ok(DataFormat::TextLabel),
        () if has("text") => Ok(DataFormat::Text),
        () => Err(format!(
            "format not recognised: needs `messages`, `prompt` and `completion`, `text`, `text` and `label`, or `input_ids` and `prompt_length`; has {}",
            fields(&object)
        )),
    }
}

/// Reads one line of the given format (not `Auto`); the error names the field.
pub fn parse(line: &str, format: DataFormat) -> Result<Record, String> {
    let mut object = object(line)?;
    match format {
        DataFormat::Auto => parse(line, detect(line)?),
        DataFormat::Chat => turns(take(&mut object, "messages")?).map(Record::Chat),
        DataFormat::PromptCompletion => {
            let turn = |role: &str, content| Turn { role: role.to_owned(), content };
            let prompt = string(take(&mut object, "prompt")?, "prompt")?;
            let completion = string(take(&mut object, "completion")?, "completion")?;
            Ok(Record::Chat(vec![turn("user", prompt), turn("assistant", completion)]))
        }
        DataFormat::Text => string(take(&mut object, "text")?, "text").map(Record::Text),
        DataFormat::TextLabel => {
            let text = string(take(&mut object, "text")?, "text")?;
            let label = match take(&mut object, "label")? {
                Value::String(label) => label,
                Value::Number(label) => label.to_string(),
                Value::Bool(label) => label.to_string(),
                other => return Err(format!("field `label` is {}, not a string", kind(&other))),
            };
            Ok(Record::Labelled { text, label })
        }
        DataFormat::Tokenized => tokens(&mut object),
    }
}

fn turns(messages: Value) -> Result<Vec<Turn>, String> {
    let Value::Array(messages) = messages else {
        return Err(format!("field `messages` is {}, not an array", kind(&messages)));
    };
    let mut turns = Vec::with_capacity(messages.len());
    for (index, message) in messages.into_iter().enumerate() {
        let Value::Object(mut message) = message else {
            return Err(format!("field `messages[{index}]` is {}, not an object", kind(&message)));
        };
        let mut text = |field: &str| match take(&mut message, field)? {
            Value::String(text) => Ok(text),
            other => Err(format!("field `{field}` is {}, not a string", kind(&other))),
        };
        let role = text("role").map_err(|problem| format!("messages[{index}]: {problem}"))?;
        let content = text("content").map_err(|problem| format!("messages[{index}]: {problem}"))?;
        turns.push(Turn { role, content });
    }
    match turns.last() {
        None => Err("field `messages` is empty".to_owned()),
        Some(last) if last.role != "assistant" => {
            Err(format!("the last of `messages` must be the assistant's, it is the {:?}'s", last.role))
        }
        Some(last) if last.content.is_empty() => Err("the assistant's turn, the last of `messages`, is empty".to_owned()),
        Some(_) if turns.len() == 1 => Err("field `messages` holds no turn before the assistant's".to_owned()),
        Some(_) => Ok(turns),
    }
}

fn tokens(object: &mut Map<String, Value>) -> Result<Record, String> {
    let Value::Array(ids) = take(object, "input_ids")? else {
        return Err("field `input_ids` is not an array of token ids".to_owned());
    };
    let input_ids: Result<Vec<u32>, String> = ids
        .iter()
        .enumerate()
        .map(|(index, id)| {
            id.as_u64().and_then(|id| u32::try_from(id).ok()).ok_or_else(|| format!("field `input_ids[{index}]` is {id}, not a token id"))
        })
        .collect();
    let input_ids = input_ids?;
    let length = take(object, "prompt_length")?;
    let prompt_length = length.as_u64().ok_or_else(|| format!("field `prompt_length` is {length}, not a count"))?;
    match usize::try_from(prompt_length) {
        Ok(prompt_length) if prompt_length < input_ids.len() => Ok(Record::Tokens { input_ids, prompt_length }),
        _ => Err(format!("field `prompt_length` is {prompt_length}, `input_ids` has {}: nothing is left to learn", input_ids.len())),
    }
}

fn object(line: &str) -> Result<Map<String, Value>, String> {
    match serde_json::from_str(line) {
        Ok(Value::Object(object)) => Ok(object),
        Ok(other) => Err(format!("is {}, not a JSON object", kind(&other))),
        Err(error) => Err(format!("not JSON: {error}")),
    }
}

fn take(object: &mut Map<String, Value>, field: &str) -> Result<Value, String> {
    object.remove(field).ok_or_else(|| format!("field `{field}` is missing"))
}

fn string(value: Value, field: &str) -> Result<String, String> {
    match value {
        Value::String(text) if text.is_empty() => Err(format!("field `{field}` is empty")),
        Value::String(text) => Ok(text),
        other => Err(format!("field `{field}` is {}, not a string", kind(&other))),
    }
}

fn fields(object: &Map<String, Value>) -> String {
    match object.is_empty() {
        true => "no fields".to_owned(),
        false => object.keys().take(8).map(|key| format!("`{}`", key.chars().take(32).collect::<String>())).collect::<Vec<_>>().join(", "),
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn recognises_each_format_by_its_fields() {
        let cases = [
            (r#"{"messages":[]}"#, DataFormat::Chat),
            (r#"{"prompt":"p","completion":"c"}"#, DataFormat::PromptCompletion),
            (r#"{"text":"t"}"#, DataFormat::Text),
            (r#"{"text":"t","label":"l"}"#, DataFormat::TextLabel),
            (r#"{"input_ids":[1],"prompt_length":0}"#, DataFormat::Tokenized),
        ];
        for (line, format) in cases {
            assert_eq!(detect(line), Ok(format), "{line}");
        }
        assert!(detect(r#"{"question":"q"}"#).unwrap_err().ends_with("has `question`"));
    }

    #[test]
    fn names_the_field_at_fault() {
        let check = |line: &str, format, expect: &str| assert_eq!(parse(line, format).unwrap_err(), expect, "{line}");
        check("[1]", DataFormat::Text, "is an array, not a JSON object");
        check(r#"{"text":3}"#, DataFormat::Text, "field `text` is a number, not a string");
        check(r#"{"text":""}"#, DataFormat::Text, "field `text` is empty");
        check(r#"{"text":"a"}"#, DataFormat::TextLabel, "field `label` is missing");
        check(r#"{"prompt":"a","text":"b"}"#, DataFormat::PromptCompletion, "field `completion` is missing");
        check(r#"{"messages":[]}"#, DataFormat::Chat, "field `messages` is empty");
        check(r#"{"messages":[{"role":"user"}]}"#, DataFormat::Chat, "messages[0]: field `content` is missing");
        check(
            r#"{"messages":[{"role":"user","content":"a"}]}"#,
            DataFormat::Chat,
            r#"the last of `messages` must be the assistant's, it is the "user"'s"#,
        );
        check(r#"{"input_ids":[1,-2],"prompt_length":0}"#, DataFormat::Tokenized, "field `input_ids[1]` is -2, not a token id");
        check(
            r#"{"input_ids":[1,2],"prompt_length":2}"#,
            DataFormat::Tokenized,
            "field `prompt_length` is 2, `input_ids` has 2: nothing is left to learn",
        );
        assert!(parse("{", DataFormat::Text).unwrap_err().starts_with("not JSON: "));
    }

    #[test]
    fn reads_prompt_and_completion_as_a_conversation() {
        let Record::Chat(turns) = parse(r#"{"prompt":"p","completion":"c"}"#, DataFormat::PromptCompletion).unwrap() else {
            panic!("not a chat")
        };
        assert_eq!(
            turns.iter().map(|turn| (turn.role.as_str(), turn.content.as_str())).collect::<Vec<_>>(),
            [("user", "p"), ("assistant", "c")]
        );
    }
}
