//! Prompts of many templates, published ones and our own, against transformers.

use std::collections::BTreeMap;
use std::path::PathBuf;

use carryon_worker::text::{Chat, ChatTemplate, Conversation, Ending, TextError, Tokenizer, Vocabulary, render_apart};
use serde::Deserialize;

use super::{digest, published, read};

#[derive(Deserialize)]
struct Prompts {
    now: i64,
    conversations: Vec<String>,
    /// Of each template and conversation: what `add_generation_prompt`, neither and `continue_final_message` give. A digest, or `!` and the refusal.
    prompts: BTreeMap<String, Vec<Vec<String>>>,
}

/// What is not equal, by template. The first hands a Python generator to `tojson`, which transformers fails at: here it is written as the list
/// it means. The second marks half a sentence as safe, so that Python escapes the other half as if it were HTML: here it is not.
const DIFFERENT: [(&str, usize); 2] = [("llama-cpp-deepseek-r1", 16), ("meetkai-functionary-medium-v3.1", 16)];

/// One token a byte.
fn bytes() -> Tokenizer {
    let printable = |byte: &u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    let mut others = (0x100..).filter_map(char::from_u32);
    let letter = |byte: u8| if printable(&byte) { char::from(byte) } else { others.next().unwrap() };
    let tokens: Vec<String> = (0..=255u8).map(letter).map(String::from).collect();
    let token_types = vec![1; 256];
    Tokenizer::from_vocabulary(&Vocabulary { tokens, token_types, pre: Some("gpt-2".to_owned()), ..Vocabulary::default() }).unwrap()
}

fn source(name: &str) -> String {
    let own = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/oracles/templates"));
    let file = [own, published("templates")].into_iter().map(|folder| folder.join(format!("{name}.jinja"))).find(|file| file.exists());
    std::fs::read_to_string(file.unwrap_or_else(|| panic!("no template {name}: `make vocabularies`"))).unwrap()
}

fn prompt(template: &Result<ChatTemplate, TextError>, tokenizer: &Tokenizer, line: &str, ending: Ending) -> Result<String, String> {
    let template = template.as_ref().map_err(|error| error.to_string())?;
    let conversation = Conversation::parse(line).map_err(|fault| format!("{fault:?}"))?;
    let ids = Chat::new(tokenizer, template, &conversation, false).and_then(|mut chat| chat.prompt(ending));
    ids.map(|ids| tokenizer.decode(&ids)).map_err(|error| match error {
        TextError::Render(message) => message,
        other => other.to_string(),
    })
}

fn agrees(found: &Result<String, String>, expected: &str) -> bool {
    match (found, expected.strip_prefix('!')) {
        (Ok(text), None) => digest(text.as_bytes()) == expected,
        (Err(_), Some("")) => true,
        (Err(message), Some(refusal)) => message == refusal,
        _ => false,
    }
}

#[test]
fn prompts_of_published_templates_are_those_of_apply_chat_template() {
    render_apart(env!("CARGO_BIN_EXE_carryon-worker").into());
    let fixture: Prompts = serde_json::from_slice(&read("prompts.json")).unwrap();
    let (tokenizer, mut cases, mut wrong) = (bytes(), 0, Vec::new());
    for (name, rows) in &fixture.prompts {
        let mut template = ChatTemplate::new(&source(name), None, Some("<s>"), Some("</s>"));
        if let Ok(template) = &mut template {
            template.stand_still(jiff::Timestamp::from_second(fixture.now).unwrap());
        }
        // One that is for tools never meets a conversation without them.
        let met = |line: &str| !name.ends_with("-tool_use") || line.contains("\"tools\"");
        for (index, (line, expected)) in fixture.conversations.iter().zip(rows).enumerate().filter(|(_, (line, _))| met(line)) {
            for (ending, expected) in [Ending::GenerationPrompt, Ending::Closed, Ending::FinalMessage].into_iter().zip(expected) {
                cases += 1;
                let found = prompt(&template, &tokenizer, line, ending);
                if !agrees(&found, expected) {
                    wrong.push(format!("{name}, conversation {index}, {ending:?}: {expected}, not {found:?}"));
                }
            }
        }
    }
    println!("{} of {cases} prompts of {} templates", cases - wrong.len(), fixture.prompts.len());
    let mut known = DIFFERENT.to_vec();
    wrong.retain(|case| match known.iter_mut().find(|(name, left)| *left > 0 && case.starts_with(&format!("{name}, "))) {
        Some((_, left)) => {
            *left -= 1;
            false
        }
        None => true,
    });
    assert!(wrong.is_empty(), "{} of {cases} differ:\n{}", wrong.len(), wrong.join("\n"));
    assert!(cases > 6000, "{cases}");
}
