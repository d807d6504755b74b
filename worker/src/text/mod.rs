//! Tokenizer and chat template: text becomes token ids and token ids become text. Knows no other room.
//!
//! BPE only, of bytes or of pieces that fall back to bytes: any other vocabulary is refused by name. A tokenizer comes from a GGUF [`Vocabulary`] or from a
//! `tokenizer.json`; [`Tokenizer::to_json`] is the one form that pools hand out and that heads are bound to.

mod apart;
mod bytes;
mod chat;
mod message;
mod outline;
mod pieces;
mod render;
mod spelling;
mod template;
mod tojson;
mod tokenizer;
mod vocabulary;

pub use apart::{render_apart, render_lines};
pub use bytes::DecodeStream;
pub use chat::{Chat, Ending, Lesson};
pub use message::{Conversation, Fault, Message, read_messages};
pub use pieces::Pieces;
pub use template::ChatTemplate;
pub use tokenizer::Tokenizer;
pub use vocabulary::Vocabulary;

/// Why a tokenizer or a template could not be made or used.
#[derive(Debug, thiserror::Error)]
pub enum TextError {
    /// The vocabulary of a checkpoint is not one we know how to use.
    #[error("unusable vocabulary: {0}")]
    Vocabulary(String),
    /// The bytes are no `tokenizer.json` that we support.
    #[error("unusable tokenizer.json: {0}")]
    TokenizerJson(String),
    /// A text could not be encoded.
    #[error("failed to encode a text: {0}")]
    Encode(String),
    /// The template does not parse.
    #[error("unusable chat template: {0}")]
    Template(String),
    /// The template refused these messages, or failed on them.
    #[error("the chat template refused the messages: {0}")]
    Render(String),
}

/// For tests: one token a byte, with its value as id, and control tokens from 256 on.
#[cfg(test)]
pub(crate) fn byte_tokenizer(control: &[&str]) -> Tokenizer {
    let printable = |byte: &u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    let mut others = (0x100..).filter_map(char::from_u32);
    let letter = |byte: u8| if printable(&byte) { Some(char::from(byte)) } else { others.next() };
    let tokens: Vec<String> =
        (0..=255u8).filter_map(letter).map(String::from).chain(control.iter().map(|token| (*token).to_owned())).collect();
    let token_types = (0..tokens.len()).map(|id| if id < 256 { 1 } else { 3 }).collect();
    let vocabulary = Vocabulary { tokens, token_types, pre: Some("gpt-2".to_owned()), ..Vocabulary::default() };
    Tokenizer::from_vocabulary(&vocabulary).expect("a vocabulary of bytes")
}
