//! From generated tokens to pieces of text that can be shown, each with its tokens.

use std::collections::VecDeque;
use std::ops::Deref;

use super::stop::StopMatcher;
use crate::exchange::wire::TokenLogprob;
use crate::text::{DecodeStream, Tokenizer};

/// A token of the answer.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Token {
    /// The token and what the pool says of it; for a prompt's first token nothing but the id.
    pub(super) logprob: TokenLogprob,
    /// Characters of the text before it.
    pub(super) offset: usize,
}

/// A part of the answer: text, and the tokens whose text begins in it.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Piece {
    /// The text.
    pub(super) text: String,
    /// Its tokens.
    pub(super) tokens: Vec<Token>,
}

impl Piece {
    /// Appends what comes after.
    pub(super) fn append(&mut self, later: Self) {
        self.text.push_str(&later.text);
        self.tokens.extend(later.tokens);
    }

    /// Whether there is nothing to show.
    pub(super) fn is_empty(&self) -> bool {
        self.text.is_empty() && self.tokens.is_empty()
    }
}

/// Decodes tokens, looks for stop strings, and holds back what cannot be shown yet.
pub(super) struct Answer<T> {
    decoder: DecodeStream<T>,
    stop: StopMatcher,
    /// Characters decoded so far.
    decoded: usize,
    /// Characters shown so far.
    shown: usize,
    waiting: VecDeque<Token>,
}

impl<T: Deref<Target = Tokenizer>> Answer<T> {
    /// An answer that ends before any of `stops`.
    pub(super) fn new(tokenizer: T, stops: Vec<String>) -> Self {
        Self { decoder: DecodeStream::new(tokenizer), stop: StopMatcher::new(stops), decoded: 0, shown: 0, waiting: VecDeque::new() }
    }

    /// Whether a stop string has come: nothing more is shown.
    pub(super) fn stopped(&self) -> bool {
        self.stop.stopped()
    }

    /// What a generated token lets be shown.
    pub(super) fn push(&mut self, logprob: TokenLogprob) -> Piece {
        let text = self.decoder.push(logprob.token);
        self.waiting.push_back(Token { logprob, offset: self.decoded });
        self.decoded += text.chars().count();
        let text = self.stop.push(&text);
        self.show(text)
    }

    /// What is left when generation ended.
    pub(super) fn finish(&mut self) -> Piece {
        let rest = self.decoder.finish();
        let mut text = self.stop.push(&rest);
        if self.stop.stopped() {
            return self.show(text);
        }
        text.push_str(&self.stop.finish());
        Piece { text, tokens: self.waiting.drain(..).collect() }
    }

    fn show(&mut self, text: String) -> Piece {
        self.shown += text.chars().count();
        let ready = self.waiting.partition_point(|token| token.offset < self.shown);
        Piece { text, tokens: self.waiting.drain(..ready).collect() }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::text::Vocabulary;

    /// One token a byte (id = byte), then `hello` as 256 and the control token `<|end|>` as 257.
    pub(in crate::serve) fn tokenizer() -> Tokenizer {
        let printable = |byte: &u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
        let mut others = (0x100..).filter_map(char::from_u32);
        let letter = |byte: u8| if printable(&byte) { char::from(byte) } else { others.next().unwrap() };
        let mut tokens: Vec<String> = (0..=255u8).map(letter).map(String::from).collect();
        tokens.extend(["hello", "<|end|>"].map(String::from));
        let mut token_types = vec![1; 258];
        token_types[257] = 3;
        Tokenizer::from_vocabulary(&Vocabulary { tokens, token_types, pre: Some("gpt-2".into()), ..Vocabulary::default() }).unwrap()
    }

    pub(in crate::serve) fn token(id: u32) -> TokenLogprob {
        TokenLogprob { token: id, logprob: Some(-0.5), top: vec![(id, -0.5)] }
    }

    fn run(stops: &[&str], ids: &[u32]) -> Vec<Piece> {
        let tokenizer = tokenizer();
        let mut answer = Answer::new(&tokenizer, stops.iter().map(ToString::to_string).collect());
        let mut pieces: Vec<Piece> = ids.iter().map(|id| answer.push(token(*id))).collect();
        pieces.push(answer.finish());
        pieces
    }

    #[test]
    fn a_character_over_four_tokens_appears_with_its_last_one() {
        let pieces = run(&[], &[0xF0, 0x9F, 0x99, 0x82, 257, 256]);
        assert_eq!(pieces.iter().map(|piece| piece.text.as_str()).collect::<Vec<_>>(), ["", "", "", "🙂", "", "hello", ""]);
        assert_eq!(pieces.iter().map(|piece| piece.tokens.len()).collect::<Vec<_>>(), [0, 0, 0, 4, 0, 2, 0]);
        assert_eq!(pieces[5].tokens[1].offset, 1);
    }

    #[test]
    fn tokens_of_a_stop_string_are_not_shown() {
        let pieces = run(&["ll"], &[u32::from(b'a'), u32::from(b'l'), 256, 256]);
        assert_eq!(pieces.iter().map(|piece| piece.text.as_str()).collect::<Vec<_>>(), ["a", "", "lhe", "", ""]);
        assert_eq!(pieces.iter().flat_map(|piece| &piece.tokens).map(|token| token.logprob.token).collect::<Vec<_>>(), [97, 108, 256]);
    }

    #[test]
    fn an_unfinished_character_is_shown_as_broken_at_the_end() {
        let pieces = run(&["zz"], &[u32::from(b'z'), 0xF0, 0x9F]);
        assert_eq!(pieces.iter().map(|piece| piece.text.as_str()).collect::<Vec<_>>(), ["", "", "", "z\u{FFFD}"]);
        assert_eq!(pieces[3].tokens.len(), 3);
    }
}
