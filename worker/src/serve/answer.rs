//! From generated tokens to pieces of text that can be shown, each with its tokens.

use std::cmp::Reverse;
use std::collections::{HashMap, VecDeque};
use std::ops::{Deref, RangeInclusive};

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
    /// Stand for the control tokens that stop strings name.
    marks: HashMap<u32, char>,
    /// Tokens that end the answer and are told of, without their text.
    ends: Vec<u32>,
    ended: bool,
    /// Characters decoded so far.
    decoded: usize,
    /// Characters shown so far.
    shown: usize,
    waiting: VecDeque<Token>,
}

impl<T: Deref<Target = Tokenizer>> Answer<T> {
    /// An answer that ends before any of `stops`, and with any of `ends`.
    pub(super) fn new(tokenizer: T, mut stops: Vec<String>, ends: Vec<u32>) -> Self {
        let marks = marks(&tokenizer, &mut stops);
        let (decoder, stop) = (DecodeStream::new(tokenizer).within(), StopMatcher::new(stops));
        Self { decoder, stop, marks, ends, ended: false, decoded: 0, shown: 0, waiting: VecDeque::new() }
    }

    /// Whether a stop string or an end has come: nothing more is shown.
    pub(super) fn stopped(&self) -> bool {
        self.ended || self.stop.stopped()
    }

    /// What a generated token lets be shown.
    pub(super) fn push(&mut self, logprob: TokenLogprob) -> Piece {
        if self.ends.contains(&logprob.token) {
            return self.end(logprob);
        }
        let mark = self.marks.get(&logprob.token).map(char::to_string);
        let text = self.decoder.push(logprob.token);
        self.waiting.push_back(Token { logprob, offset: self.decoded });
        self.decoded += text.chars().count();
        let text = self.stop.push(&mark.unwrap_or(text));
        self.show(text)
    }

    fn end(&mut self, logprob: TokenLogprob) -> Piece {
        let mut piece = self.finish();
        if !self.stop.stopped() {
            piece.tokens.push(Token { logprob, offset: self.decoded });
        }
        self.ended = true;
        piece
    }

    /// What is left when generation ended.
    pub(super) fn finish(&mut self) -> Piece {
        let rest = self.decoder.finish();
        let mut text = self.stop.push(&rest);
        if self.stop.stopped() {
            return self.show(text);
        }
        text.push_str(&self.stop.finish());
        Piece { text: self.visible(text), tokens: self.waiting.drain(..).collect() }
    }

    fn show(&mut self, text: String) -> Piece {
        let text = self.visible(text);
        self.shown += text.chars().count();
        let ready = self.waiting.partition_point(|token| token.offset < self.shown);
        Piece { text, tokens: self.waiting.drain(..ready).collect() }
    }

    fn visible(&self, mut text: String) -> String {
        if !self.marks.is_empty() {
            text.retain(|character| !MARKS.contains(&character));
        }
        text
    }
}

/// Unicode's noncharacters, which no text holds.
const MARKS: RangeInclusive<char> = '\u{FDD0}'..='\u{FDEF}';

/// Text leaves control tokens out, so a stop string would never meet one: those that stop strings name get marks, and each such stop string
/// is looked for with its marks too.
fn marks(tokenizer: &Tokenizer, stops: &mut Vec<String>) -> HashMap<u32, char> {
    let name = |id: &u32| std::str::from_utf8(tokenizer.token_bytes(*id)).unwrap_or_default();
    let is_named = |id: &u32| !name(id).is_empty() && stops.iter().any(|stop| stop.contains(name(id)));
    let mut named: Vec<u32> = tokenizer.special_ids().filter(is_named).collect();
    // The longest name first: another may be a part of it.
    named.sort_by_key(|id| (Reverse(name(id).len()), *id));
    let marks: Vec<(u32, char)> = named.into_iter().zip(MARKS).collect();
    let mark = |stop: &String| marks.iter().fold(stop.clone(), |stop, (id, mark)| stop.replace(name(id), &mark.to_string()));
    let marked: Vec<String> = stops.iter().map(mark).filter(|marked| !stops.contains(marked)).collect();
    stops.extend(marked);
    marks.into_iter().collect()
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
        let mut answer = Answer::new(&tokenizer, stops.iter().map(ToString::to_string).collect(), Vec::new());
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
    fn a_stop_string_finds_the_control_tokens_that_it_names() {
        let [a, b, end] = [u32::from(b'a'), u32::from(b'b'), 257];
        for (stops, ids, shown, tokens, stopped) in [
            (&["<|end|>"][..], &[a, end, b][..], "a", &[a][..], true),
            (&["<|end|>b"], &[a, end, a, end, b], "aa", &[a, end, a], true),
            (&["a<|end|>"], &[b, a, end, b], "b", &[b], true),
            (&["<|end|><|end|>"], &[a, end, b, end, end], "ab", &[a, end, b], true),
            (&["<|end|>"], &[end], "", &[], true),
            // Written out letter by letter it is the same stop string; half of it is none.
            (&["<|end|>"], &[a, 60, 124, 101, 110, 100, 124, 62, b], "a", &[a], true),
            (&["x<|end|>"], &[a, end, b], "ab", &[a, end, b], false),
            (&["<|end"], &[a, end, b], "ab", &[a, end, b], false),
            // One that no stop string names stays out of the way.
            (&["ab"], &[b, a, end, b], "b", &[b], true),
        ] {
            let pieces = run(stops, ids);
            assert_eq!(pieces.iter().map(|piece| piece.text.as_str()).collect::<String>(), shown, "{stops:?} {ids:?}");
            let told: Vec<u32> = pieces.iter().flat_map(|piece| &piece.tokens).map(|token| token.logprob.token).collect();
            assert_eq!(told, tokens, "{stops:?} {ids:?}");
            let (tokenizer, stops) = (tokenizer(), stops.iter().map(ToString::to_string).collect());
            let mut answer = Answer::new(&tokenizer, stops, Vec::new());
            ids.iter().for_each(|id| drop(answer.push(token(*id))));
            assert_eq!(answer.stopped(), stopped, "{shown} {ids:?}");
        }
    }

    #[test]
    fn an_end_that_is_told_of_is_a_token_without_text() {
        let tokenizer = tokenizer();
        for (stops, ids, shown, tokens) in [
            (&[][..], &[u32::from(b'a'), 257][..], "a", &[97, 257][..]),
            (&["ab"], &[u32::from(b'a'), 257], "a", &[97, 257]),
            (&[], &[0xF0, 257], "\u{FFFD}", &[0xF0, 257]),
            (&["\u{FFFD}"], &[0xF0, 257], "", &[]),
            (&[], &[257], "", &[257]),
        ] {
            let mut answer = Answer::new(&tokenizer, stops.iter().map(ToString::to_string).collect(), vec![257]);
            let mut whole = Piece::default();
            ids.iter().for_each(|id| whole.append(answer.push(token(*id))));
            assert!(answer.stopped());
            assert_eq!(
                (whole.text.as_str(), whole.tokens.iter().map(|token| token.logprob.token).collect::<Vec<_>>()),
                (shown, tokens.to_vec())
            );
        }
    }

    #[test]
    fn an_unfinished_character_is_shown_as_broken_at_the_end() {
        let pieces = run(&["zz"], &[u32::from(b'z'), 0xF0, 0x9F]);
        assert_eq!(pieces.iter().map(|piece| piece.text.as_str()).collect::<Vec<_>>(), ["", "", "", "z\u{FFFD}"]);
        assert_eq!(pieces[3].tokens.len(), 3);
    }
}
