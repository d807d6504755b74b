//! Tokenizer, chat template, masks.
