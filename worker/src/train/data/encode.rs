//! From what a line says to tokens.

use super::label;
use super::record::{Record, Said};
use super::sample::{self, Sample, Target};
use super::{Counts, Language, Rules};
use crate::text::{Chat, ChatTemplate, Conversation, Ending, Lesson, TextError};

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
        Record::Labelled { text, label } => {
            let target = label::target(label, rules)?;
            let ids = language.tokenizer.encode(&text, true).map_err(said)?;
            match ids.is_empty() {
                true => return Err("field `text` has no tokens".to_owned()),
                false => Sample { ids, target },
            }
        }
        Record::Compared(texts) => {
            let part = |(said, part): (Said, u32)| Ok(Sample { ids: whole(said, rules, language, counts)?, target: Target::Part(part) });
            return texts.into_iter().zip(0..).map(part).collect();
        }
        Record::Chat(mut conversation, targets) => {
            let template = language.template.ok_or("the base has no chat template: use `text` or `input_ids`")?;
            leave_out(&mut conversation, template, counts)?;
            let mut chat = Chat::new(language.tokenizer, template, &conversation, rules.split_special_tokens).map_err(said)?;
            let lessons = chat.lessons(&targets, rules.end_tokens).map_err(said)?;
            return Ok(lessons.into_iter().map(|Lesson { ids, learned }| Sample { ids, target: Target::Tokens(learned) }).collect());
        }
    };
    Ok(vec![sample])
}

/// Token ids of what is judged as a whole.
fn whole(said: Said, rules: &Rules<'_>, language: Language<'_>, counts: &mut Counts) -> Result<Vec<u32>, String> {
    let ids = match said {
        Said::Text(text) => language.tokenizer.encode(&text, true),
        Said::Chat(mut conversation) => {
            let template = language.template.ok_or("the base has no chat template: use texts")?;
            leave_out(&mut conversation, template, counts)?;
            let chat = Chat::new(language.tokenizer, template, &conversation, rules.split_special_tokens);
            chat.and_then(|mut chat| chat.prompt(Ending::Closed))
        }
    };
    match ids.map_err(|error| error.to_string())? {
        ids if ids.is_empty() => Err("one of the texts has no tokens".to_owned()),
        ids => Ok(ids),
    }
}

/// Takes out what the template does not look at, and counts it. What it would be wrong to learn without is refused.
fn leave_out(conversation: &mut Conversation, template: &ChatTemplate, counts: &mut Counts) -> Result<(), String> {
    let Conversation { messages, tools, options } = conversation;
    let nowhere = |field: &str| Err(format!("field `{field}`: the base's chat template has no place for it"));
    if !tools.is_empty() && !template.knows("tools", tools) {
        return nowhere("tools");
    }
    if let Some((name, _)) = options.iter().find(|(name, _)| !template.knows(name, tools)) {
        return nowhere(&format!("chat_template_kwargs.{name}"));
    }
    for (index, turn) in messages.iter_mut().enumerate() {
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
