//! Tokenizer and chat template: text becomes token ids and token ids become text. Knows no other room.
//!
//! Byte-level BPE only: any other vocabulary is refused by name. A tokenizer comes from a GGUF [`Vocabulary`] or from a
//! `tokenizer.json`; [`Tokenizer::to_json`] is the one form that pools hand out and that heads are bound to.

mod bytes;
mod template;
mod tokenizer;
mod vocabulary;

pub use bytes::DecodeStream;
pub use template::{ChatTemplate, Message};
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
