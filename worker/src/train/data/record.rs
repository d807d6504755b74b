//! What one line says, before tokens: format detection and field checks. Pure.

use carryon_crds::job::{DataFormat, Targets, Task};
use minijinja::Value as Member;
use serde_json::{Map, Value};

use super::Rules;
use super::preference;
use super::problem::{ARRAY, Problem};
use super::strict::Strict;
use crate::text::{Conversation, Message};

/// One line of a data file.
#[derive(Clone, Debug, PartialEq)]
pub enum Record {
    /// A conversation, and the numbers of the assistant's turns that are learned.
    Chat(Conversation, Vec<usize>),
    /// Plain text, all of it learned.
    Text(String),
    /// A text or conversation and its label.
    Labelled {
        /// The text.
        text: Said,
        /// Label as written: a name, a list of names, or a number.
        label: Value,
    },
    /// Texts or conversations that are compared with each other.
    Compared(Vec<Said>),
    /// Token ids; those from `prompt_length` on are learned.
    Tokens {
        /// Token ids.
        input_ids: Vec<u32>,
        /// Tokens that are given.
        prompt_length: usize,
    },
}

/// What is judged as a whole.
#[derive(Clone, Debug, PartialEq)]
pub enum Said {
    /// A text.
    Text(String),
    /// A text behind a prompt.
    Answer {
        /// The prompt.
        prompt: String,
        /// The text.
        text: String,
    },
    /// A conversation, up to the end of its last turn.
    Chat(Conversation),
}

/// The format of a line, by its fields and, where they are those of several, by the task. Never `Auto`.
pub fn detect(line: &str, task: Task) -> Result<DataFormat, Problem> {
    let object = object(line)?;
    let has = |field: &str| object.contains_key(field);
    match () {
        () if has("messages") && has("label") && task.is_pooled() => Ok(DataFormat::TextLabel),
        () if has("messages") => Ok(DataFormat::Chat),
        () if has("prompt") && has("completion") => Ok(DataFormat::PromptCompletion),
        () if has("chosen") && has("rejected") => Ok(DataFormat::Preference),
        () if has("anchor") && has("positive") => Ok(DataFormat::Pair),
        () if has("input_ids") => Ok(DataFormat::Tokenized),
        () if has("text") && has("label") => Ok(DataFormat::TextLabel),
        () if has("text") => Ok(DataFormat::Text),
        () => Err(Problem::from(format!(
            "format not recognised: needs `messages`, `prompt` and `completion`, `text`, `text` and `label`, `chosen` and `rejected`, `anchor` and `positive`, or `input_ids` and `prompt_length`; has {}",
            fields(&object)
        ))),
    }
}

/// Reads one line of the given format (not `Auto`), and names the fields that say nothing to it; the error names the field at fault.
pub fn parse(line: &str, format: DataFormat, rules: &Rules<'_>) -> Result<(Record, Vec<String>), Problem> {
    let mut object = object(line)?;
    let record = match format {
        DataFormat::Auto => return parse(line, detect(line, rules.task)?, rules),
        DataFormat::Chat => chat(conversation(line, &mut object)?, rules.targets)?,
        DataFormat::PromptCompletion => {
            let prompt = string(take(&mut object, "prompt")?, "prompt")?;
            let completion = string(take(&mut object, "completion")?, "completion")?;
            let messages = vec![Message::new("user", prompt), Message::new("assistant", completion)];
            Record::Chat(Conversation { messages, ..Conversation::default() }, vec![1])
        }
        DataFormat::Text => Record::Text(string(take(&mut object, "text")?, "text")?),
        DataFormat::TextLabel => {
            let text = match object.contains_key("messages") && !object.contains_key("text") {
                true => Said::Chat(conversation(line, &mut object)?),
                false => Said::Text(string(take(&mut object, "text")?, "text")?),
            };
            Record::Labelled { text, label: take(&mut object, "label")? }
        }
        DataFormat::Preference => preference::record(&mut object)?,
        DataFormat::Pair => {
            let texts = ["anchor", "positive"].map(|field| Ok(Said::Text(string(take(&mut object, field)?, field)?)));
            Record::Compared(texts.into_iter().collect::<Result<_, String>>()?)
        }
        DataFormat::Tokenized => tokens(&mut object)?,
    };
    Ok((record, object.into_iter().map(|(name, _)| name).collect()))
}

/// The conversation that a line holds.
fn conversation(line: &str, object: &mut Map<String, Value>) -> Result<Conversation, String> {
    take(object, "messages")?;
    object.remove("tools");
    object.remove("chat_template_kwargs");
    Conversation::parse(line).map_err(|fault| format!("field `{}` {}", fault.place, fault.problem))
}

/// A conversation whose last turn is the assistant's. A turn of weight 0 is no target, nor is one with nothing before it: nobody can ask for it.
fn chat(mut conversation: Conversation, targets: Targets) -> Result<Record, String> {
    let turns = &mut conversation.messages;
    let mut learned = Vec::new();
    for (index, turn) in turns.iter_mut().enumerate() {
        let weighs = weight(turn).map_err(|problem| format!("field `messages[{index}].weight` {problem}"))?;
        if weighs && turn.role == "assistant" && index > 0 {
            learned.push(index);
        }
    }
    let last = turns.len() - 1;
    if turns[last].role != "assistant" {
        return Err(format!("the last of `messages` must be the assistant's, it is the {:?}'s", turns[last].role));
    }
    if last == 0 {
        return Err("field `messages` holds no turn before the assistant's".to_owned());
    }
    if targets == Targets::LastAssistant {
        learned.retain(|index| *index == last);
    }
    let silent = |turn: &Message| turn.content.is_empty() && !turn.others.iter().any(|(name, _)| name == "tool_calls");
    match learned.iter().find(|index| silent(&turns[**index])) {
        Some(index) => {
            Err(format!("field `messages[{index}].content` is empty: there is nothing to learn but silence; give the turn weight 0"))
        }
        None if learned.is_empty() => Err("field `messages`: every turn that could be learned has weight 0".to_owned()),
        None => Ok(Record::Chat(conversation, learned)),
    }
}

/// Whether a turn is learned, by its `weight`, which no template gets to see.
fn weight(turn: &mut Message) -> Result<bool, String> {
    let Some(place) = turn.others.iter().position(|(name, _)| name == "weight") else { return Ok(true) };
    let weight = turn.others.remove(place).1;
    match (weight == Member::from(0), weight == Member::from(1)) {
        (true, _) => Ok(false),
        (_, true) if turn.role == "assistant" => Ok(true),
        (_, true) => Err(format!("is 1, but the turn is the {:?}'s: only the assistant's turns are learned", turn.role)),
        _ => Err(format!("is {}, it must be 0 or 1", serde_json::to_string(&weight).unwrap_or_default())),
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

/// The members of the object that a line is. One that is null is absent: exports of tables have a column for every field that any line has.
fn object(line: &str) -> Result<Map<String, Value>, Problem> {
    if line.trim_start().starts_with('[') {
        return Err(Problem::from(ARRAY));
    }
    match serde_json::from_str(line).map(|Strict(value)| value) {
        Ok(Value::Object(mut object)) => {
            object.retain(|_, value| !value.is_null());
            Ok(object)
        }
        Ok(other) => Err(Problem::from(format!("is {}, not a JSON object", kind(&other)))),
        Err(error) => Err(Problem::not_json(line, &error)),
    }
}

pub fn take(object: &mut Map<String, Value>, field: &str) -> Result<Value, String> {
    object.remove(field).ok_or_else(|| format!("field `{field}` is missing"))
}

pub fn string(value: Value, field: &str) -> Result<String, String> {
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

pub fn kind(value: &Value) -> &'static str {
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

    fn rules(targets: Targets) -> Rules<'static> {
        Rules { targets, ..super::super::tests::rules(Task::CausalLM, &[]) }
    }

    fn read(line: &str, format: DataFormat) -> Result<(Record, Vec<String>), String> {
        parse(line, format, &rules(Targets::AllAssistant)).map_err(|problem| problem.text)
    }

    /// Roles and contents, and the turns that are learned.
    fn turns(line: &str, targets: Targets) -> Result<(String, Vec<usize>), String> {
        match parse(line, DataFormat::Auto, &rules(targets)).map_err(|problem| problem.text)?.0 {
            Record::Chat(conversation, learned) => {
                let turn = |turn: &Message| format!("{}:{}", turn.role, turn.content);
                Ok((conversation.messages.iter().map(turn).collect::<Vec<_>>().join("|"), learned))
            }
            other => panic!("{other:?} is no chat"),
        }
    }

    #[test]
    fn recognises_each_format_by_its_fields() {
        let cases = [
            (r#"{"messages":[]}"#, DataFormat::Chat),
            (r#"{"prompt":"p","completion":"c"}"#, DataFormat::PromptCompletion),
            (r#"{"text":"t"}"#, DataFormat::Text),
            (r#"{"text":"t","label":"l"}"#, DataFormat::TextLabel),
            (r#"{"anchor":"a","positive":"p"}"#, DataFormat::Pair),
            (r#"{"prompt":"p","chosen":"c","rejected":"r"}"#, DataFormat::Preference),
            (r#"{"input_ids":[1],"prompt_length":0}"#, DataFormat::Tokenized),
            (r#"{"messages":null,"prompt":null,"text":"hello","label":null}"#, DataFormat::Text),
            (r#"{"messages":null,"prompt":"p","completion":"c","text":null}"#, DataFormat::PromptCompletion),
        ];
        for (line, format) in cases {
            assert_eq!(detect(line, Task::CausalLM), Ok(format), "{line}");
        }
        let both = r#"{"messages":[],"label":"l"}"#;
        let of = |task| detect(both, task).unwrap();
        assert_eq!((of(Task::CausalLM), of(Task::Regression)), (DataFormat::Chat, DataFormat::TextLabel));
        assert!(detect(r#"{"question":"q"}"#, Task::CausalLM).unwrap_err().text.ends_with("has `question`"));
    }

    #[test]
    fn names_the_field_at_fault() {
        let check = |line: &str, format, expect: &str| assert_eq!(read(line, format).unwrap_err(), expect, "{line}");
        check("[1]", DataFormat::Text, "a JSON array, not JSON Lines: one object a line");
        check("[", DataFormat::Auto, "a JSON array, not JSON Lines: one object a line");
        check("3", DataFormat::Text, "is a number, not a JSON object");
        check(r#"{"text":3}"#, DataFormat::Text, "field `text` is a number, not a string");
        check(r#"{"text":""}"#, DataFormat::Text, "field `text` is empty");
        check(r#"{"text":"a"}"#, DataFormat::TextLabel, "field `label` is missing");
        check(r#"{"label":"a"}"#, DataFormat::TextLabel, "field `text` is missing");
        check(r#"{"messages":[3],"label":"a"}"#, DataFormat::TextLabel, "field `messages[0]` is a number, not an object");
        check(r#"{"text":"a","label":null}"#, DataFormat::TextLabel, "field `label` is missing");
        check(r#"{"prompt":"a","text":"b"}"#, DataFormat::PromptCompletion, "field `completion` is missing");
        check(r#"{"messages":[]}"#, DataFormat::Chat, "field `messages` is empty");
        check(r#"{"messages":[3]}"#, DataFormat::Chat, "field `messages[0]` is a number, not an object");
        check(r#"{"messages":[{"role":"user"}]}"#, DataFormat::Chat, "field `messages[0].content` is missing");
        check(
            r#"{"messages":[{"role":"user","content":"a"}]}"#,
            DataFormat::Chat,
            r#"the last of `messages` must be the assistant's, it is the "user"'s"#,
        );
        for role in ["human", "User", "bot", "gpt", ""] {
            let line = format!(r#"{{"messages":[{{"role":"{role}","content":"a"}},{{"role":"assistant","content":"b"}}]}}"#);
            let expect = format!("field `messages[0].role` is {role:?}: it must be one of system, developer, user, assistant, tool");
            check(&line, DataFormat::Chat, &expect);
        }
        check(r#"{"input_ids":[1,-2],"prompt_length":0}"#, DataFormat::Tokenized, "field `input_ids[1]` is -2, not a token id");
        check(
            r#"{"input_ids":[1,2],"prompt_length":2}"#,
            DataFormat::Tokenized,
            "field `prompt_length` is 2, `input_ids` has 2: nothing is left to learn",
        );
    }

    #[test]
    fn every_turn_of_the_assistant_is_learned_or_the_last_but_for_weight_0() {
        let line = |weights: [&str; 2]| {
            format!(
                r#"{{"messages":[{{"role":"developer","content":"s"}},{{"role":"user","content":"a"}},{{"role":"assistant","content":"b"{}}},
                {{"role":"user","content":"c","weight":0}},{{"role":"assistant","content":"d"{}}}]}}"#,
                weights[0], weights[1]
            )
            .replace('\n', "")
        };
        let text = "system:s|user:a|assistant:b|user:c|assistant:d".to_owned();
        let (no, yes) = (r#","weight":0"#, r#","weight":1"#);
        assert_eq!(turns(&line(["", ""]), Targets::AllAssistant), Ok((text.clone(), vec![2, 4])));
        assert_eq!(turns(&line(["", ""]), Targets::LastAssistant), Ok((text.clone(), vec![4])));
        assert_eq!(turns(&line([no, r#","weight":null"#]), Targets::AllAssistant), Ok((text.clone(), vec![4])));
        assert_eq!(turns(&line([yes, no]), Targets::AllAssistant), Ok((text, vec![2])));
        let none = "field `messages`: every turn that could be learned has weight 0";
        assert_eq!(turns(&line([no, no]), Targets::AllAssistant), Err(none.to_owned()));
        assert_eq!(turns(&line([yes, no]), Targets::LastAssistant), Err(none.to_owned()));
        let half = turns(&line([r#","weight":0.5"#, ""]), Targets::AllAssistant);
        assert_eq!(half, Err("field `messages[2].weight` is 0.5, it must be 0 or 1".to_owned()));
        let text = turns(&line([r#","weight":"1""#, ""]), Targets::AllAssistant);
        assert_eq!(text, Err(r#"field `messages[2].weight` is "1", it must be 0 or 1"#.to_owned()));
        let user = r#"{"messages":[{"role":"user","content":"a","weight":1},{"role":"assistant","content":"b"}]}"#;
        assert!(
            turns(user, Targets::AllAssistant).unwrap_err().starts_with(r#"field `messages[0].weight` is 1, but the turn is the "user"'s"#)
        );
    }

    #[test]
    fn a_greeting_is_no_target_for_nobody_can_ask_for_it() {
        let line =
            r#"{"messages":[{"role":"assistant","content":"hello"},{"role":"user","content":"a"},{"role":"assistant","content":"b"}]}"#;
        assert_eq!(turns(line, Targets::AllAssistant).unwrap().1, [2]);
        let alone = r#"{"messages":[{"role":"assistant","content":"hello"}]}"#;
        assert_eq!(turns(alone, Targets::AllAssistant).unwrap_err(), "field `messages` holds no turn before the assistant's");
    }

    #[test]
    fn contents_are_text_or_parts_joined_as_they_are() {
        let line = r#"{"messages":[{"role":"user","content":[{"type":"text","text":"a"},{"type":"text","text":" b"}]},{"role":"assistant","content":"c"}]}"#;
        assert_eq!(turns(line, Targets::AllAssistant).unwrap().0, "user:a b|assistant:c");
        let image = r#"{"messages":[{"role":"user","content":[{"type":"text","text":"a"},{"type":"image_url"}]},{"role":"assistant","content":"c"}]}"#;
        let refusal = turns(image, Targets::AllAssistant).unwrap_err();
        assert!(refusal.starts_with("field `messages[0].content[1]` must be {\"type\": \"text\""), "{refusal}");
    }

    #[test]
    fn reads_prompt_and_completion_as_a_conversation_and_names_what_it_does_not_read() {
        let line = r#"{"prompt":"p","completion":" 4","source":"x","id":3,"n":null}"#;
        assert_eq!(turns(line, Targets::AllAssistant), Ok(("user:p|assistant: 4".to_owned(), vec![1])));
        assert_eq!(read(line, DataFormat::Auto).unwrap().1, ["id", "source"]);
    }

    #[test]
    fn calls_of_tools_hold_their_arguments_as_an_object() {
        let call = |arguments: &str| {
            format!(
                r#"{{"messages":[{{"role":"user","content":"a"}},{{"role":"assistant","content":null,"tool_calls":[{{"type":"function","function":{{"name":"f","arguments":{arguments}}}}}]}}]}}"#
            )
        };
        for arguments in [r#""{\"z\": 1, \"a\": 2}""#, r#"{"z": 1, "a": 2}"#] {
            let Record::Chat(conversation, learned) = read(&call(arguments), DataFormat::Chat).unwrap().0 else { panic!("no chat") };
            let calls = &conversation.messages[1].others[0].1;
            let expect = r#"[{"type":"function","function":{"name":"f","arguments":{"z":1,"a":2}}}]"#;
            assert_eq!(serde_json::to_string(calls).unwrap(), expect, "in the order of the line");
            assert_eq!(learned, [1]);
        }
        let expect = "field `messages[1].tool_calls[0].function.arguments` is no JSON object";
        assert_eq!(read(&call(r#""{""#), DataFormat::Chat).unwrap_err(), expect);
    }
}
