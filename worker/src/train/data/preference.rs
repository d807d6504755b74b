//! Pairs of which people chose one, as TRL has them. Pure.

use serde_json::{Map, Value, json};

use super::record::{Record, Said, kind, string, take};
use crate::text::Conversation;

/// `chosen` first, then `rejected`: both texts or both lists of messages, behind `prompt` where there is one.
pub fn record(object: &mut Map<String, Value>) -> Result<Record, String> {
    let prompt = object.remove("prompt");
    let beside: Vec<(&str, Value)> =
        ["tools", "chat_template_kwargs"].into_iter().filter_map(|name| Some((name, object.remove(name)?))).collect();
    let said = ["chosen", "rejected"].map(|field| said(take(object, field)?, field, prompt.as_ref(), &beside));
    let [chosen, rejected] = said;
    let (chosen, rejected) = (chosen?, rejected?);
    match chosen == rejected {
        true => Err("fields `chosen` and `rejected` are the same".to_owned()),
        false => Ok(Record::Compared(vec![chosen, rejected])),
    }
}

fn said(value: Value, field: &str, prompt: Option<&Value>, beside: &[(&str, Value)]) -> Result<Said, String> {
    let prompt_is = |wanted: &str| Err(format!("field `prompt` is {}, `{field}` {wanted}", prompt.map_or("absent", kind)));
    match (value, prompt) {
        (value @ Value::String(_), None) => string(value, field).map(Said::Text),
        (value @ Value::String(_), Some(Value::String(prompt))) => Ok(Said::Answer { prompt: prompt.clone(), text: string(value, field)? }),
        (Value::String(_), _) => prompt_is("a string"),
        (Value::Array(turns), None) => chat(turns, field, beside),
        (Value::Array(turns), Some(Value::Array(prompt))) => chat(prompt.iter().cloned().chain(turns).collect(), field, beside),
        (Value::Array(_), _) => prompt_is("an array of messages"),
        (other, _) => Err(format!("field `{field}` is {}, neither a string nor an array of messages", kind(&other))),
    }
}

fn chat(turns: Vec<Value>, field: &str, beside: &[(&str, Value)]) -> Result<Said, String> {
    let mut object = json!({ "messages": turns });
    for (name, value) in beside {
        object[*name] = value.clone();
    }
    let conversation = Conversation::parse(&object.to_string());
    conversation.map(Said::Chat).map_err(|fault| format!("field `{field}`: {} {}", fault.place, fault.problem))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(line: Value) -> Result<Vec<String>, String> {
        let Value::Object(mut object) = line else { panic!("no object") };
        let Record::Compared(texts) = record(&mut object)? else { panic!("no pair") };
        let show = |said| match said {
            Said::Text(text) => text,
            Said::Answer { prompt, text } => format!("{prompt}{text}"),
            Said::Chat(chat) => chat.messages.iter().map(|turn| format!("{}:{}", turn.role, turn.content)).collect::<Vec<_>>().join("|"),
        };
        Ok(texts.into_iter().map(show).collect())
    }

    fn turn(role: &str, content: &str) -> Value {
        json!({"role": role, "content": content})
    }

    #[test]
    fn pairs_are_texts_or_conversations_with_or_without_their_prompt() {
        assert_eq!(read(json!({"chosen": "good", "rejected": "bad"})).unwrap(), ["good", "bad"]);
        assert_eq!(read(json!({"prompt": "2+2=", "chosen": "4", "rejected": "5"})).unwrap(), ["2+2=4", "2+2=5"]);
        let (question, right, wrong) = (turn("user", "2+2?"), turn("assistant", "4"), turn("assistant", "5"));
        let expected = ["user:2+2?|assistant:4", "user:2+2?|assistant:5"];
        assert_eq!(read(json!({"chosen": [question, right], "rejected": [question, wrong]})).unwrap(), expected);
        assert_eq!(read(json!({"prompt": [question], "chosen": [right], "rejected": [wrong]})).unwrap(), expected);
    }

    #[test]
    fn what_is_no_pair_is_refused_by_its_field() {
        let check = |line: Value, expected: &str| assert_eq!(read(line).unwrap_err(), expected);
        check(json!({"chosen": "good"}), "field `rejected` is missing");
        check(json!({"chosen": "good", "rejected": 3}), "field `rejected` is a number, neither a string nor an array of messages");
        check(json!({"chosen": "good", "rejected": "good"}), "fields `chosen` and `rejected` are the same");
        check(json!({"prompt": [], "chosen": "a", "rejected": "b"}), "field `prompt` is an array, `chosen` a string");
        check(json!({"chosen": [3], "rejected": []}), "field `chosen`: messages[0] is a number, not an object");
    }
}
