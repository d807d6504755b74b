//! Text to token ids and back.

use std::collections::{BTreeMap, HashSet};
use std::ops::Range;
use std::sync::OnceLock;

use tokenizers::{OffsetReferential, OffsetType};

use super::bytes::{DecodeStream, TokenBytes};
use super::spelling::{Prefix, Spelling, without_prefix};
use super::{TextError, Vocabulary, outline};

/// A BPE tokenizer, of bytes or of pieces that fall back to bytes.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// The same, for which control tokens are text like any other. Made when somebody writes one.
    plain: OnceLock<tokenizers::Tokenizer>,
    prefix: Prefix,
    /// The two of them for parts of a text, which get no blank in front; none where a whole text gets none.
    bare: Option<Box<tokenizers::Tokenizer>>,
    bare_plain: OnceLock<tokenizers::Tokenizer>,
    bytes: TokenBytes,
    spelling: Spelling,
    special: HashSet<u32>,
}

/// Where a part of a text stands in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// At its beginning.
    Beginning,
    /// Behind a control token.
    BehindControl,
    /// Behind other text.
    Within,
}

/// As many ids as no vocabulary has: the table of token bytes is this long at most.
const MAX_TOKEN_ID: u32 = 4 << 20;

impl Tokenizer {
    /// From the vocabulary of a GGUF file; an unknown pre-tokenizer is refused by name.
    pub fn from_vocabulary(vocabulary: &Vocabulary) -> Result<Self, TextError> {
        Self::new(vocabulary.build()?).map_err(TextError::Vocabulary)
    }

    /// From the bytes of a `tokenizer.json`; truncation and padding set there are dropped.
    pub fn from_json(json: &[u8]) -> Result<Self, TextError> {
        let unusable = |reason: String| TextError::TokenizerJson(reason);
        outline::check(json).map_err(unusable)?;
        let mut inner = tokenizers::Tokenizer::from_bytes(json).map_err(|error| unusable(error.to_string()))?;
        inner.with_truncation(None).map_err(|error| unusable(error.to_string()))?;
        inner.with_padding(None);
        Self::new(inner).map_err(unusable)
    }

    fn new(inner: tokenizers::Tokenizer) -> Result<Self, String> {
        let unknown = "its decoder is none that we know: only BPE is supported, of bytes (ByteLevel) or with ByteFallback";
        let spelling = Spelling::of(inner.get_decoder()).ok_or(unknown)?;
        let mut tokens: BTreeMap<u32, String> = inner.get_vocab(false).into_iter().map(|(token, id)| (id, token)).collect();
        let added = inner.get_added_tokens_decoder();
        let special = added.iter().filter(|(_, token)| token.special).map(|(id, _)| *id).collect();
        tokens.extend(added.into_iter().map(|(id, token)| (id, token.content)));
        match tokens.keys().next_back() {
            None => Err(String::from("it has no tokens")),
            Some(last) if *last > MAX_TOKEN_ID => Err(format!("token id {last} is beyond {MAX_TOKEN_ID}")),
            Some(_) => {
                let (prefix, bare) = without_prefix(&inner);
                let (bytes, bare) = (TokenBytes::new(&tokens, spelling), bare.map(Box::new));
                Ok(Self { inner, plain: OnceLock::new(), prefix, bare, bare_plain: OnceLock::new(), bytes, spelling, special })
            }
        }
    }

    /// The tokenizer as `tokenizer.json`: the same bytes for the same tokenizer, whatever it was made from.
    pub fn to_json(&self) -> Result<Vec<u8>, TextError> {
        self.inner.to_string(false).map(String::into_bytes).map_err(|error| TextError::TokenizerJson(error.to_string()))
    }

    /// Token ids of `text`. Control tokens written in the text are recognised. `add_special_tokens` adds what the tokenizer
    /// puts around a text (e.g. a beginning-of-sequence token); a rendered chat template already holds it.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, TextError> {
        let encoding = self.inner.encode_fast(text, add_special_tokens).map_err(|error| TextError::Encode(error.to_string()))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Token ids of `text`, in which control tokens are text like any other, as with transformers' `split_special_tokens`.
    pub fn encode_plain(&self, text: &str) -> Result<Vec<u32>, TextError> {
        self.encode_part(text, true, true)
    }

    /// Whether a part of a text at `place` gets a blank in front of it.
    pub(super) fn prefixes(&self, place: Place) -> bool {
        match self.prefix {
            Prefix::None => false,
            Prefix::First => place == Place::Beginning,
            Prefix::Each => place != Place::Within,
        }
    }

    /// Token ids of a part of a text, with the tokenizer's blank in front of it or without; `plain` as in [`Self::encode_plain`].
    pub(super) fn encode_part(&self, text: &str, prefixed: bool, plain: bool) -> Result<Vec<u32>, TextError> {
        let (tokenizer, plain_one) = match &self.bare {
            Some(bare) if !prefixed => (&**bare, &self.bare_plain),
            _ => (&self.inner, &self.plain),
        };
        let split = || {
            let mut split = tokenizer.clone();
            split.set_encode_special_tokens(true);
            split
        };
        let tokenizer = if plain { plain_one.get_or_init(split) } else { tokenizer };
        let encoding = tokenizer.encode_fast(text, false).map_err(|error| TextError::Encode(error.to_string()))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The control tokens in `text`, each with the bytes it takes up.
    pub fn control_tokens(&self, text: &str) -> Vec<(Range<usize>, u32)> {
        let split = self.inner.get_added_vocabulary().extract_and_normalize(self.inner.get_normalizer(), text);
        let splits = split.get_splits(OffsetReferential::Original, OffsetType::Byte);
        let token =
            |tokens: &Option<Vec<tokenizers::Token>>| tokens.as_ref()?.first().map(|token| token.id).filter(|id| self.is_special(*id));
        splits.into_iter().filter_map(|(_, (start, end), tokens)| Some((start..end, token(tokens)?))).collect()
    }

    /// Text of `ids`, a whole one, without control tokens; bytes that are no UTF-8 become U+FFFD.
    pub fn decode(&self, ids: &[u32]) -> String {
        let mut stream = self.stream();
        let mut text: String = ids.iter().map(|id| stream.push(*id)).collect();
        text.push_str(&stream.finish());
        text
    }

    /// Decodes token by token.
    pub fn stream(&self) -> DecodeStream<&Self> {
        DecodeStream::new(self)
    }

    /// Whether a decoded text loses a blank at its beginning, which the tokenizer put there.
    pub(super) fn trims(&self) -> bool {
        matches!(self.spelling, Spelling::Pieces { trims: true, .. })
    }

    /// The bytes a token stands for, control tokens by their name; none for an id outside the vocabulary.
    pub fn token_bytes(&self, id: u32) -> &[u8] {
        self.bytes.get(id)
    }

    /// Whether `id` is a control token, which decoded text leaves out.
    pub fn is_special(&self, id: u32) -> bool {
        self.special.contains(&id)
    }

    /// Ids of the control tokens, in no order.
    pub fn special_ids(&self) -> impl Iterator<Item = u32> {
        self.special.iter().copied()
    }

    /// Id of a token that was added to the vocabulary, a control token or a user-defined one, by its text.
    pub fn added_token_id(&self, token: &str) -> Option<u32> {
        self.inner.get_added_vocabulary().get_vocab().get(token).copied()
    }

    /// Id of a token, by its text in the vocabulary.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// One more than the largest id.
    pub fn vocab_size(&self) -> usize {
        self.bytes.count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All 256 bytes, one merge (`h` + `i`), a control token, a user-defined one.
    fn vocabulary(pre: &str) -> Vocabulary {
        let printable = |byte: &u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
        let mut tokens: Vec<String> = (0..=255u8).filter(printable).map(|byte| char::from(byte).to_string()).collect();
        tokens.extend((0x100..0x144).filter_map(char::from_u32).map(String::from));
        tokens.extend(["hi", "<|end|>", "<tool call>"].map(String::from));
        let mut token_types = vec![1; tokens.len()];
        token_types[257] = 3;
        token_types[258] = 4;
        Vocabulary { tokens, token_types, merges: vec!["h i".into()], pre: Some(pre.into()), bos: Some(257), ..Vocabulary::default() }
    }

    #[test]
    fn decoding_undoes_encoding_but_for_control_tokens() {
        let tokenizer = Tokenizer::from_vocabulary(&vocabulary("smollm")).unwrap();
        let text = "hi 🙂 <tool call> 12\n";
        let mut ids = tokenizer.encode(text, true).unwrap();
        assert!(ids.contains(&256) && ids.contains(&258), "{ids:?}");
        ids.push(257);
        assert_eq!(tokenizer.decode(&ids), text);
        assert_eq!(tokenizer.encode("hi<|end|>", true).unwrap(), [256, 257]);
        assert_eq!(tokenizer.token_bytes(257), b"<|end|>");
        assert_eq!(tokenizer.token_bytes(1 << 30), b"");
    }

    #[test]
    fn json_is_the_same_after_a_round_trip() {
        for pre in ["smollm", "gpt-2", "llama-bpe", "qwen2"] {
            let json = Tokenizer::from_vocabulary(&vocabulary(pre)).unwrap().to_json().unwrap();
            assert_eq!(json, Tokenizer::from_vocabulary(&vocabulary(pre)).unwrap().to_json().unwrap(), "{pre}");
            assert_eq!(json, Tokenizer::from_json(&json).unwrap().to_json().unwrap(), "{pre}");
        }
    }

    #[test]
    fn begins_with_bos_where_the_vocabulary_says_so() {
        let tokenizer = Tokenizer::from_vocabulary(&Vocabulary { add_bos: true, ..vocabulary("gpt-2") }).unwrap();
        assert_eq!(tokenizer.encode("hi", true).unwrap(), [257, 256]);
        assert_eq!(tokenizer.encode("hi", false).unwrap(), [256]);
    }

    #[test]
    fn refuses_what_it_does_not_know_by_name() {
        let refusal = |vocabulary: Vocabulary| Tokenizer::from_vocabulary(&vocabulary).err().unwrap().to_string();
        assert!(refusal(vocabulary("mystery")).contains("unknown pre-tokenizer \"mystery\""));
        assert!(refusal(Vocabulary { pre: None, ..vocabulary("") }).contains("tokenizer.ggml.pre"));
        assert!(refusal(Vocabulary { merges: vec!["hi".into()], ..vocabulary("gpt-2") }).contains("merge 0"));
        assert!(refusal(Vocabulary { merges: vec!["zz zz".into()], ..vocabulary("gpt-2") }).contains("zz"));
        assert!(refusal(Vocabulary { merges: vec!["<|end|> <|end|>".into()], ..vocabulary("gpt-2") }).contains("longer than any token"));
        let mut twice = vocabulary("gpt-2");
        twice.tokens[3] = "hi".into();
        assert!(refusal(twice).contains("tokens 3 and 256 are both \"hi\""));
        assert!(Tokenizer::from_json(b"{}").is_err());
    }
}
