//! From token ids to text: a table of every token's bytes, and a stream that never cuts a character in two.

use std::collections::{BTreeMap, HashMap};
use std::ops::Deref;

use super::Tokenizer;
use super::spelling::Spelling;

/// The bytes of every token, in one allocation.
pub(super) struct TokenBytes {
    bytes: Vec<u8>,
    /// Start of each token in `bytes`, and the end of the last one.
    starts: Vec<u32>,
}

impl TokenBytes {
    /// `tokens` maps ids to tokens; ids without a token have no bytes.
    pub(super) fn new(tokens: &BTreeMap<u32, String>, spelling: Spelling) -> Self {
        let alphabet = alphabet();
        let count = tokens.keys().next_back().map_or(0, |last| *last as usize + 1);
        let (mut bytes, mut starts) = (Vec::new(), Vec::with_capacity(count + 1));
        for id in 0..count as u32 {
            starts.push(bytes.len() as u32);
            let Some(token) = tokens.get(&id) else { continue };
            spelling.spell(token, &alphabet, &mut bytes);
        }
        starts.push(bytes.len() as u32);
        Self { bytes, starts }
    }

    /// One more than the largest id.
    pub(super) fn count(&self) -> usize {
        self.starts.len() - 1
    }

    /// Bytes of a token; none for an id outside the vocabulary.
    pub(super) fn get(&self, id: u32) -> &[u8] {
        match self.starts.get(id as usize..id as usize + 2) {
            Some(range) => &self.bytes[range[0] as usize..range[1] as usize],
            None => &[],
        }
    }
}

/// The byte-level alphabet of GPT-2: printable Latin-1 stands for itself, the other bytes for U+0100 and up.
fn alphabet() -> HashMap<char, u8> {
    let printable = |byte: &u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    let others = (0..=255u8).filter(|byte| !printable(byte)).zip(0x100u32..);
    let mut alphabet: HashMap<char, u8> = (0..=255u8).filter(printable).map(|byte| (char::from(byte), byte)).collect();
    alphabet.extend(others.filter_map(|(byte, code)| Some((char::from_u32(code)?, byte))));
    alphabet
}

/// Turns tokens into text one by one. A character that is spread over tokens appears with its last one; all pieces together
/// are the text of [`Tokenizer::decode`] over the same tokens.
///
/// `T` is how it holds the tokenizer: `&Tokenizer`, or `Arc<Tokenizer>` for a stream that must live on its own.
pub struct DecodeStream<T> {
    tokenizer: T,
    decoder: Utf8Decoder,
    control_tokens: bool,
    /// Whether a blank that comes now is the one that the tokenizer put in front.
    trims: bool,
}

impl<T: Deref<Target = Tokenizer>> DecodeStream<T> {
    /// A stream at the beginning of a text.
    pub fn new(tokenizer: T) -> Self {
        let trims = tokenizer.trims();
        Self { tokenizer, decoder: Utf8Decoder::default(), control_tokens: false, trims }
    }

    /// This stream, for tokens that go on with a text: a blank at its beginning is the text's.
    pub fn within(self) -> Self {
        Self { trims: false, ..self }
    }

    /// This stream, with control tokens shown by their names.
    pub fn with_control_tokens(self) -> Self {
        Self { control_tokens: true, ..self }
    }

    /// The text that `id` completes: empty within a character, and for control tokens unless they are shown.
    pub fn push(&mut self, id: u32) -> String {
        if !self.control_tokens && self.tokenizer.is_special(id) {
            return String::new();
        }
        let mut text = self.decoder.push(self.tokenizer.token_bytes(id));
        if self.trims && !text.is_empty() {
            self.trims = false;
            if text.starts_with(' ') {
                text.remove(0);
            }
        }
        text
    }

    /// What is left of an unfinished character (U+FFFD), or nothing.
    pub fn finish(&mut self) -> String {
        self.decoder.finish()
    }
}

/// `String::from_utf8_lossy`, piece by piece.
#[derive(Default)]
struct Utf8Decoder {
    /// The beginning of a character: at most three bytes between calls.
    pending: Vec<u8>,
}

impl Utf8Decoder {
    fn push(&mut self, bytes: &[u8]) -> String {
        self.pending.extend(bytes);
        let mut text = String::new();
        let mut rest = self.pending.as_slice();
        while !rest.is_empty() {
            match std::str::from_utf8(rest) {
                Ok(valid) => {
                    text.push_str(valid);
                    rest = &[];
                }
                Err(error) => {
                    let (valid, tail) = rest.split_at(error.valid_up_to());
                    text.push_str(&String::from_utf8_lossy(valid));
                    rest = tail;
                    let Some(invalid) = error.error_len() else { break };
                    text.push(char::REPLACEMENT_CHARACTER);
                    rest = &tail[invalid..];
                }
            }
        }
        self.pending = rest.to_vec();
        text
    }

    fn finish(&mut self) -> String {
        String::from_utf8_lossy(&std::mem::take(&mut self.pending)).into_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_join_to_the_lossy_text_wherever_they_are_cut() {
        let mut bytes = "a🙂é\u{200d}漢".as_bytes().to_vec();
        bytes.extend([0xFF, b'x', 0xF0, 0x9F, b'y', 0xC3]);
        for width in 1..=bytes.len() {
            let mut decoder = Utf8Decoder::default();
            let mut text: String = bytes.chunks(width).map(|chunk| decoder.push(chunk)).collect();
            text.push_str(&decoder.finish());
            assert_eq!(text, String::from_utf8_lossy(&bytes), "pieces of {width}");
        }
    }

    #[test]
    fn the_alphabet_covers_every_byte_once() {
        let mut bytes: Vec<u8> = alphabet().into_values().collect();
        bytes.sort_unstable();
        assert_eq!(bytes, (0..=255).collect::<Vec<u8>>());
        assert_eq!(alphabet()[&'Ġ'], b' ');
        assert_eq!(alphabet()[&'Ċ'], b'\n');
    }
}
