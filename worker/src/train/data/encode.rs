//! From what a line says to tokens.

use carryon_crds::job::{Task, Thinking};

use super::label;
use super::record::{Record, Said};
use super::sample::{self, Sample, Target};
use super::{Counts, Language, Rules};
use crate::text::{Chat, ChatTemplate, Conversation, Ending, Lesson, Message, TextError};

/// Most names of members that nobody reads; the rest are counted together.
pub const MAX_IGNORED: usize = 16;

/// The samples of a line; a conversation may need several.
pub fn samples(record: Record, rules: &Rules<'_>, language: Language<'_>, counts: &mut Counts) -> Result<Vec<Sample>, String> {
    let said = |error: TextError| error.to_string();
    let sample = match record {
        Record::Tokens { input_ids, prompt_length } => sample::from_prompt_length(input_ids, prompt_length)?,
        Record::Text(text) => {
            let mut ids = language.tokenizer.encode(&text, true).map_err(said)?;
            ids.extend(rules.text_end.filter(|_| ids.last().is_none_or(|last| !rules.end_tokens.contains(last))));
            sample::from_prompt_length(ids, 0).map_err(|problem| format!("field `text`: {problem}"))?
        }
        Record::Labelled { text, label } => Sample { target: label::target(label, rules)?, ids: whole(text, rules, language, counts)? },
        Record::Compared(texts) => {
            let part = |(said, part): (Said, u32)| match rules.task {
                Task::Dpo => answer(said, part, rules, language, counts),
                _ => Ok(Sample { ids: whole(said, rules, language, counts)?, target: Target::Part(part) }),
            };
            return texts.into_iter().zip(0..).map(part).collect();
        }
        Record::Chat(conversation, targets) => {
            let lessons = lessons(conversation, &targets, rules, language, counts)?;
            return Ok(lessons.into_iter().map(|Lesson { ids, learned }| Sample { ids, target: Target::Tokens(learned) }).collect());
        }
    };
    Ok(vec![sample])
}

/// What is learned of these turns of a conversation.
fn lessons(
    mut conversation: Conversation,
    targets: &[usize],
    rules: &Rules<'_>,
    language: Language<'_>,
    counts: &mut Counts,
) -> Result<Vec<Lesson>, String> {
    let template = language.template.ok_or("the base has no chat template: use `text` or `input_ids`")?;
    leave_out(&mut conversation, template, rules, counts)?;
    let chat = Chat::new(language.tokenizer, template, &conversation, rules.split_special_tokens);
    chat.and_then(|mut chat| chat.lessons(targets, rules.end_tokens)).map_err(|error| error.to_string())
}

/// The last turn of a conversation, as one of those that are compared.
fn answer(said: Said, part: u32, rules: &Rules<'_>, language: Language<'_>, counts: &mut Counts) -> Result<Sample, String> {
    let conversation = match said {
        Said::Text(_) => return Err("field `prompt` is missing: in task DPO `chosen` and `rejected` answer it".to_owned()),
        Said::Answer { prompt, text } => {
            Conversation { messages: vec![Message::new("user", prompt), Message::new("assistant", text)], ..Conversation::default() }
        }
        Said::Chat(conversation) => conversation,
    };
    match conversation.messages.as_slice() {
        [_, .., last] if last.role == "assistant" => {}
        _ => return Err("`chosen` and `rejected` must each end with the assistant's turn, behind another one".to_owned()),
    }
    let last = conversation.messages.len() - 1;
    match lessons(conversation, &[last], rules, language, counts)?.pop() {
        Some(Lesson { ids, mut learned }) if learned.len() == 1 => Ok(Sample { ids, target: Target::Answer(part, learned.remove(0)) }),
        _ => Err("the last turn is not one piece".to_owned()),
    }
}

/// Token ids of what is judged as a whole.
fn whole(said: Said, rules: &Rules<'_>, language: Language<'_>, counts: &mut Counts) -> Result<Vec<u32>, String> {
    let ids = match said {
        Said::Answer { prompt, text } => language.tokenizer.encode(&(prompt + &text), true),
        Said::Text(text) => language.tokenizer.encode(&text, true),
        Said::Chat(mut conversation) => {
            let template = language.template.ok_or("the base has no chat template: use texts")?;
            leave_out(&mut conversation, template, rules, counts)?;
            let chat = Chat::new(language.tokenizer, template, &conversation, rules.split_special_tokens);
            chat.and_then(|mut chat| chat.prompt(Ending::Closed))
        }
    };
    match ids.map_err(|error| error.to_string())? {
        ids if ids.is_empty() => Err("a text has no tokens".to_owned()),
        ids => Ok(ids),
    }
}

/// Takes out what was thought, where it is to be dropped, and what the template does not look at, which is counted. What it would be wrong to learn without
/// is refused.
fn leave_out(conversation: &mut Conversation, template: &ChatTemplate, rules: &Rules<'_>, counts: &mut Counts) -> Result<(), String> {
    let Conversation { messages, tools, options } = conversation;
    let nowhere = |field: &str| Err(format!("field `{field}`: the base's chat template has no place for it"));
    if !tools.is_empty() && !template.knows("tools", tools) {
        return nowhere("tools");
    }
    if let Some((name, _)) = options.iter().find(|(name, _)| !template.knows(name, tools)) {
        return nowhere(&format!("chat_template_kwargs.{name}"));
    }
    for (index, turn) in messages.iter_mut().enumerate() {
        if rules.thinking == Thinking::Drop && turn.role == "assistant" {
            let silent = turn.content.is_empty();
            turn.drop_thinking();
            if !silent && turn.content.is_empty() {
                return Err(format!("field `messages[{index}].content` is nothing but thinking, which data.thinking has dropped"));
            }
        }
        let (known, unknown) = std::mem::take(&mut turn.others).into_iter().partition(|(name, _)| template.knows(name, tools));
        turn.others = known;
        for (name, _) in unknown {
            if name == "tool_calls" {
                return nowhere(&format!("messages[{index}].tool_calls"));
            }
            counts.ignore(format!("messages[].{name}"));
        }
    }
    Ok(())
}

impl Counts {
    /// Counts a member that nobody reads.
    pub(super) fn ignore(&mut self, name: String) {
        let ignored = &mut self.ignored;
        let full = ignored.len() >= MAX_IGNORED && !ignored.contains_key(&name);
        let name = if full { "others".to_owned() } else { name.chars().take(64).collect() };
        *ignored.entry(name).or_default() += 1;
    }
}
