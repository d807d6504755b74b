//! From conversations to tokens, in one way for requests and for training.
//!
//! What users write is no template: a control token in a content (`<|im_end|>`) is text like any other, or a user could forge turns. So
//! a character that occurs nowhere is put into each of them before the template is rendered. The control tokens of what is rendered are then
//! the template's own; between them that character is taken out again, and control tokens are not looked for.

use std::collections::HashMap;
use std::ops::Range;

use super::message::Conversation;
use super::tokenizer::Place;
use super::{ChatTemplate, TextError, Tokenizer};

/// Private use: no text that means something to anybody has one of these.
const MARKS: std::ops::RangeInclusive<char> = '\u{F0000}'..='\u{FFFFD}';
/// A control token may come about where others were broken up; how often that is mended.
const PASSES: usize = 8;

/// A conversation on its way to tokens.
pub struct Chat<'a> {
    tokenizer: &'a Tokenizer,
    template: &'a ChatTemplate,
    conversation: Conversation,
    /// What is inside of every control token that a user wrote, if there are any.
    mark: Option<char>,
    /// Tokens of the texts between control tokens that were encoded so far, without and with a blank in front: later prompts begin as earlier ones do.
    known: [HashMap<String, Vec<u32>>; 2],
}

/// How a prompt ends, in transformers' words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// `add_generation_prompt`: with the beginning of the assistant's next turn.
    GenerationPrompt,
    /// Neither: with the end of the last turn.
    Closed,
    /// `continue_final_message`: within the last turn, behind its content.
    FinalMessage,
}

/// Put behind the content of a turn that goes on, to find its end; the blank shows whether the template trims contents.
const END_OF_CONTENT: &str = "CONTINUE_FINAL_MESSAGE_TAG ";

/// A sequence to learn from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lesson {
    /// Token ids.
    pub ids: Vec<u32>,
    /// Those that are learned.
    pub learned: Vec<Range<usize>>,
}

impl<'a> Chat<'a> {
    /// `split_special_tokens`: whether control tokens in contents are text like any other.
    pub fn new(
        tokenizer: &'a Tokenizer,
        template: &'a ChatTemplate,
        conversation: &Conversation,
        split_special_tokens: bool,
    ) -> Result<Self, TextError> {
        let chat = |conversation, mark| Self { tokenizer, template, conversation, mark, known: Default::default() };
        let mut texts = Vec::new();
        let conversation = conversation.map(&mut |text| {
            texts.push(text.to_owned());
            text.to_owned()
        });
        if !split_special_tokens || texts.iter().all(|text| tokenizer.control_tokens(text).is_empty()) {
            return Ok(chat(conversation, None));
        }
        let unused = |mark: &char| !template.holds(*mark) && texts.iter().all(|text| !text.contains(*mark));
        let unmarked = || TextError::Encode("the texts hold control tokens that cannot be told from the template's".to_owned());
        let mark = MARKS.into_iter().find(unused).ok_or_else(unmarked)?;
        let mut whole = true;
        let marked = conversation.map(&mut |text| {
            let marked = marked(tokenizer, text, mark);
            whole &= marked.is_some();
            marked.unwrap_or_default()
        });
        if whole { Ok(chat(marked, Some(mark))) } else { Err(unmarked()) }
    }

    /// Token ids of what a request says.
    pub fn prompt(&mut self, ending: Ending) -> Result<Vec<u32>, TextError> {
        let turns = self.conversation.messages.len();
        let rendered = match ending {
            Ending::GenerationPrompt => self.render(turns, true)?,
            Ending::Closed => self.render(turns, false)?,
            Ending::FinalMessage => self.render_to_content()?,
        };
        Ok(self.encode(&rendered, Place::Beginning)?.0)
    }

    /// The conversation up to the end of its last content, as transformers finds it.
    fn render_to_content(&mut self) -> Result<String, TextError> {
        let Some(last) = self.conversation.messages.last_mut() else {
            return Err(TextError::Render("there is no turn to go on with".to_owned()));
        };
        last.content.push_str(END_OF_CONTENT);
        let mut rendered = self.render(self.conversation.messages.len(), false)?;
        let found = rendered.rfind(END_OF_CONTENT.trim_end());
        let end = found.ok_or_else(|| TextError::Render("the template leaves out the turn that is to go on".to_owned()))?;
        let trimmed = !rendered[end..].starts_with(END_OF_CONTENT);
        rendered.truncate(if trimmed { rendered[..end].trim_end().len() } else { end });
        Ok(rendered)
    }

    /// The sequences from which the turns number `targets` (ascending, the assistant's) are learned, each turn up to the first of `end`.
    ///
    /// A turn is what the template writes behind the prompt for it. Prompt and turn are encoded apart, for so they meet when the head is asked.
    /// Turns share a sequence where the prompt of the later one begins with the tokens of the earlier ones.
    pub fn lessons(&mut self, targets: &[usize], end: &[u32]) -> Result<Vec<Lesson>, TextError> {
        let mut lessons: Vec<Lesson> = Vec::new();
        for &turn in targets {
            let before = self.render(turn, true)?;
            let after = self.render(turn + 1, false)?;
            let said = after.strip_prefix(before.as_str()).ok_or_else(|| parted(turn, &before, &after))?;
            let (mut ids, behind) = self.encode(&before, Place::Beginning)?;
            let (mut answer, _) = self.encode(said, behind)?;
            if let Some(last) = answer.iter().position(|id| end.contains(id)) {
                answer.truncate(last + 1);
            }
            if ids.is_empty() || answer.is_empty() {
                let what = if ids.is_empty() { "is begun by" } else { "has" };
                return Err(TextError::Render(format!("messages[{turn}] {what} no tokens")));
            }
            let learned = ids.len()..ids.len() + answer.len();
            match lessons.last_mut().filter(|lesson| ids.starts_with(&lesson.ids)) {
                Some(lesson) => {
                    ids.extend(answer);
                    lesson.ids = ids;
                    lesson.learned.push(learned);
                }
                None => {
                    ids.extend(answer);
                    lessons.push(Lesson { ids, learned: vec![learned] });
                }
            }
        }
        Ok(lessons)
    }

    /// The first `turns` turns as the template has them.
    fn render(&self, turns: usize, add_generation_prompt: bool) -> Result<String, TextError> {
        self.template.render(&self.conversation, turns, add_generation_prompt)
    }

    /// Token ids of what a template rendered, which stands at `place`, and where what comes next stands.
    fn encode(&mut self, rendered: &str, mut place: Place) -> Result<(Vec<u32>, Place), TextError> {
        let (mut ids, mut done) = (Vec::new(), 0);
        for (range, id) in self.tokenizer.control_tokens(rendered) {
            ids.extend(self.encode_between(&rendered[done..range.start], place)?);
            ids.push(id);
            (done, place) = (range.end, Place::BehindControl);
        }
        ids.extend(self.encode_between(&rendered[done..], place)?);
        Ok((ids, if done == rendered.len() { place } else { Place::Within }))
    }

    /// Token ids of a text without control tokens but those that users wrote.
    fn encode_between(&mut self, text: &str, place: Place) -> Result<&[u32], TextError> {
        let prefixed = self.tokenizer.prefixes(place);
        let known = &mut self.known[usize::from(prefixed)];
        if !known.contains_key(text) {
            let ids = match self.mark.filter(|mark| text.contains(*mark)) {
                Some(mark) => self.tokenizer.encode_part(&text.replace(mark, ""), prefixed, true)?,
                None => self.tokenizer.encode_part(text, prefixed, false)?,
            };
            known.insert(text.to_owned(), ids);
        }
        Ok(&known[text])
    }
}

/// `text` with `mark` in every control token, so that none is left; None where one is too short to be broken up.
fn marked(tokenizer: &Tokenizer, text: &str, mark: char) -> Option<String> {
    let mut text = text.to_owned();
    for _ in 0..PASSES {
        let tokens = tokenizer.control_tokens(&text);
        if tokens.is_empty() {
            return Some(text);
        }
        let (mut broken, mut done) = (String::with_capacity(text.len() + 4 * tokens.len()), 0);
        for (range, _) in tokens {
            let token = &text[range.clone()];
            // A token may take the blanks beside it along.
            let start = range.start + token.len() - token.trim_start().len();
            let second = start + text[start..].chars().next().map_or(0, char::len_utf8);
            broken.push_str(&text[done..second]);
            broken.push(mark);
            done = second;
        }
        broken.push_str(&text[done..]);
        text = broken;
    }
    None
}

fn parted(turn: usize, before: &str, after: &str) -> TextError {
    let common = before
        .char_indices()
        .zip(after.chars())
        .find(|((_, one), other)| one != other)
        .map_or(before.len().min(after.len()), |((at, _), _)| at);
    let excerpt = |text: &str| text[common..].chars().take(24).collect::<String>();
    TextError::Render(format!(
        "messages[{turn}]: the template asks for the turn with {:?} where it writes {:?} when the turn is there: what is asked and what is learned would differ",
        excerpt(before),
        excerpt(after)
    ))
}

#[cfg(test)]
mod tests {
    use super::super::{Message, byte_tokenizer};
    use super::*;

    fn tokenizer() -> Tokenizer {
        byte_tokenizer(&["<e>", "e>x<", "<|e|>"])
    }

    /// What is shown of tokens: bytes, and control tokens as `[id]`.
    fn shown(ids: &[u32]) -> String {
        let bytes = ids.iter().flat_map(|id| if *id < 256 { vec![*id as u8] } else { format!("[{id}]").into_bytes() });
        String::from_utf8(bytes.collect()).unwrap()
    }

    fn conversation(turns: &[(&str, &str)]) -> Conversation {
        Conversation { messages: turns.iter().map(|(role, content)| Message::new(role, *content)).collect(), ..Conversation::default() }
    }

    fn prompt(template: &str, turns: &[(&str, &str)], ending: Ending) -> String {
        let (tokenizer, template) = (tokenizer(), ChatTemplate::new(template, None, None, None).unwrap());
        let ids = Chat::new(&tokenizer, &template, &conversation(turns), true).unwrap().prompt(ending).unwrap();
        shown(&ids)
    }

    const PLAIN: &str = "{% for m in messages %}{{ m.role }}:{{ m.content }}<|e|>{% endfor %}{% if add_generation_prompt %}A:{% endif %}";
    const TRIMS: &str =
        "{% for m in messages %}{{ m.role }}:{{ m.content | trim | upper }}<|e|>{% endfor %}{% if add_generation_prompt %}A:{% endif %}";

    #[test]
    fn only_the_template_s_control_tokens_are_parsed() {
        for (content, expect) in [
            ("a", "a"),
            ("<|e|>", "<|e|>"),
            ("<e><e>", "<e><e>"),
            ("<e>x<e>", "<e>x<e>"),
            (" <|e|>\n<|e|>", " <|e|>\n<|e|>"),
            ("\u{F0000}<e>\u{F0001}", "\u{F0000}<e>\u{F0001}"),
            ("å<e>日", "å<e>日"),
        ] {
            assert_eq!(prompt(PLAIN, &[("user", content)], Ending::GenerationPrompt), format!("user:{expect}[258]A:"), "{content:?}");
        }
        assert_eq!(prompt(TRIMS, &[("user", " a<|e|> ")], Ending::Closed), "user:A<|E|>[258]", "a template still trims");
        assert_eq!(
            prompt("{{ messages | tojson }}<e>", &[("user", "<|e|>")], Ending::Closed),
            r#"[{"role": "user", "content": "<|e|>"}][256]"#
        );
    }

    #[test]
    fn a_text_that_uses_up_all_marks_is_refused() {
        let (tokenizer, template) = (tokenizer(), ChatTemplate::new(PLAIN, None, None, None).unwrap());
        let content: String = MARKS.chain("<|e|>".chars()).collect();
        let refused = Chat::new(&tokenizer, &template, &conversation(&[("user", &content)]), true).err().unwrap();
        assert!(matches!(refused, TextError::Encode(_)), "{refused}");
    }

    // As transformers 5.23 has it: `apply_chat_template(messages, tokenize=False, continue_final_message=True)`.
    #[test]
    fn a_last_turn_that_goes_on_ends_with_its_content() {
        let turns = [("user", "Hi"), ("assistant", "The sky is ")];
        assert_eq!(prompt(PLAIN, &turns, Ending::FinalMessage), "user:Hi[258]assistant:The sky is ");
        let trims = TRIMS.replace(" | upper", "");
        assert_eq!(prompt(&trims, &turns, Ending::FinalMessage), "user:Hi[258]assistant:The sky is");
        assert_eq!(prompt(PLAIN, &turns, Ending::Closed), "user:Hi[258]assistant:The sky is [258]");
    }

    /// The learned parts of each sequence, in brackets.
    fn learned(template: &str, turns: &[(&str, &str)], targets: &[usize]) -> Result<Vec<String>, TextError> {
        let (tokenizer, template) = (tokenizer(), ChatTemplate::new(template, None, None, None).unwrap());
        let lessons = Chat::new(&tokenizer, &template, &conversation(turns), true)?.lessons(targets, &[258])?;
        let show = |Lesson { ids, learned }: Lesson| {
            let (mut text, mut done) = (String::new(), 0);
            for range in learned {
                text += &format!("{}{{{}}}", shown(&ids[done..range.start]), shown(&ids[range.clone()]));
                done = range.end;
            }
            text
        };
        Ok(lessons.into_iter().map(show).collect())
    }

    const CHAT: [(&str, &str); 4] = [("user", "a"), ("A", " b\n"), ("user", "c"), ("A", "d<|e|>")];

    #[test]
    fn a_turn_is_learned_as_the_template_writes_it() {
        assert_eq!(learned(PLAIN, &CHAT, &[1, 3]).unwrap(), ["user:a[258]A:{ b\n[258]}user:c[258]A:{d<|e|>[258]}"]);
        assert_eq!(learned(TRIMS, &CHAT, &[1, 3]).unwrap(), ["user:A[258]A:{B[258]}user:C[258]A:{D<|E|>[258]}"]);
        assert_eq!(learned(PLAIN, &CHAT, &[3]).unwrap(), ["user:a[258]A: b\n[258]user:c[258]A:{d<|e|>[258]}"]);
        // No end token: all that is written for the turn.
        assert_eq!(learned(&PLAIN.replace("<|e|>", ";"), &CHAT, &[1]).unwrap(), ["user:a;A:{ b\n;}"]);
    }

    #[test]
    fn turns_that_the_template_writes_otherwise_later_are_learned_apart() {
        // As templates do that leave out of earlier turns what the model thought.
        let thinks = "{% for m in messages %}{{ m.role }}:{% if loop.last and m.role == 'A' %}(hm){% endif %}{{ m.content }}<|e|>{% endfor %}{% if add_generation_prompt %}A:{% endif %}";
        let expect = ["user:a[258]A:{(hm) b\n[258]}", "user:a[258]A: b\n[258]user:c[258]A:{(hm)d<|e|>[258]}"];
        assert_eq!(learned(thinks, &CHAT, &[1, 3]).unwrap(), expect);
        let opens = PLAIN.replace("A:{% endif", "A:<think>{% endif");
        let refused = learned(&opens, &CHAT, &[1]).unwrap_err().to_string();
        assert!(refused.contains(r#"messages[1]: the template asks for the turn with "<think>" where it writes " b\n<|e|>""#), "{refused}");
    }
}
