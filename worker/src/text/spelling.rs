//! How tokens spell text, and whether a text gets a blank in front of it.

use tokenizers::normalizers::Sequence as Normalizers;
use tokenizers::pre_tokenizers::metaspace::PrependScheme;
use tokenizers::pre_tokenizers::sequence::Sequence as PreTokenizers;
use tokenizers::{Decoder, DecoderWrapper, NormalizerWrapper, PreTokenizerWrapper};

/// The blank of SentencePiece.
const BLANK: &str = "\u{2581}";

/// What the text of a token stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Spelling {
    /// Bytes, in GPT-2's alphabet.
    ByteLevel,
    /// Itself, with `▁` for a blank, as SentencePiece has it.
    Pieces {
        /// `<0x0A>` is a byte.
        byte_fallback: bool,
        /// A decoded text loses the blank that was put in front of it.
        trims: bool,
    },
}

impl Spelling {
    /// What `decoder` undoes; None for one that we do not know.
    pub(super) fn of(decoder: Option<&DecoderWrapper>) -> Option<Self> {
        let decoders = match decoder? {
            DecoderWrapper::ByteLevel(_) => return Some(Self::ByteLevel),
            DecoderWrapper::Sequence(sequence) => sequence.get_decoders(),
            one => std::slice::from_ref(one),
        };
        use DecoderWrapper::{ByteFallback, ByteLevel, Fuse, Metaspace, Replace, Strip};
        match decoders {
            [ByteLevel(_)] => return Some(Self::ByteLevel),
            several if several.iter().all(|one| matches!(one, ByteFallback(_) | Fuse(_) | Metaspace(_) | Replace(_) | Strip(_))) => {}
            _ => return None,
        }
        // They hide what they hold; what they make of tokens tells.
        let tokens = ["▁", "▁a", "▁▁b ", "<0xC3>", "<0xA5>"].map(String::from).to_vec();
        let decoded = decoder?.decode(tokens).ok()?;
        let known = [
            ("  a  b å", true, false),
            (" a  b å", true, true),
            ("  a  b <0xC3><0xA5>", false, false),
            (" a  b <0xC3><0xA5>", false, true),
        ];
        let (_, byte_fallback, trims) = known.into_iter().find(|(text, ..)| *text == decoded)?;
        Some(Self::Pieces { byte_fallback, trims })
    }

    /// Appends the bytes of a token.
    pub(super) fn spell(self, token: &str, alphabet: &std::collections::HashMap<char, u8>, bytes: &mut Vec<u8>) {
        match self {
            // An added token may hold characters outside the alphabet: it stands for its own text.
            Self::ByteLevel => match token.chars().map(|character| alphabet.get(&character).copied()).collect::<Option<Vec<u8>>>() {
                Some(decoded) => bytes.extend(decoded),
                None => bytes.extend(token.as_bytes()),
            },
            Self::Pieces { byte_fallback, .. } => match byte(token).filter(|_| byte_fallback) {
                Some(byte) => bytes.push(byte),
                None => bytes.extend(token.replace(BLANK, " ").as_bytes()),
            },
        }
    }
}

/// The byte that `<0x0A>` stands for.
fn byte(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    (digits.len() == 2).then(|| u8::from_str_radix(digits, 16).ok())?
}

/// Where a tokenizer puts a blank that nobody wrote.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Prefix {
    /// Nowhere.
    None,
    /// In front of a text.
    First,
    /// In front of a text, and behind every control token.
    Each,
}

/// The same tokenizer without such blanks, and where it puts them.
pub(super) fn without_prefix(tokenizer: &tokenizers::Tokenizer) -> (Prefix, Option<tokenizers::Tokenizer>) {
    let mut bare = tokenizer.clone();
    let mut prefix = Prefix::None;
    if let Some(normalizer) = tokenizer.get_normalizer() {
        let normalizers = match normalizer {
            NormalizerWrapper::Sequence(sequence) => sequence.as_ref().to_vec(),
            one => vec![one.clone()],
        };
        let (prepending, others): (Vec<_>, Vec<_>) = normalizers.into_iter().partition(|one| matches!(one, NormalizerWrapper::Prepend(_)));
        if !prepending.is_empty() {
            prefix = Prefix::Each;
            let _ = bare.with_normalizer(Some(Normalizers::new(others)));
        }
    }
    if let Some(pre_tokenizer) = tokenizer.get_pre_tokenizer() {
        let mut pre_tokenizers = match pre_tokenizer {
            PreTokenizerWrapper::Sequence(sequence) => sequence.as_ref().to_vec(),
            one => vec![one.clone()],
        };
        for one in &mut pre_tokenizers {
            prefix = match remove_prefix(one) {
                Prefix::None => prefix,
                found => found,
            };
        }
        if prefix != Prefix::None {
            bare.with_pre_tokenizer(Some(PreTokenizers::new(pre_tokenizers)));
        }
    }
    (prefix, (prefix != Prefix::None).then_some(bare))
}

fn remove_prefix(pre_tokenizer: &mut PreTokenizerWrapper) -> Prefix {
    match pre_tokenizer {
        PreTokenizerWrapper::Metaspace(metaspace) => {
            let scheme = metaspace.get_prepend_scheme();
            metaspace.set_prepend_scheme(PrependScheme::Never);
            match scheme {
                PrependScheme::First => Prefix::First,
                PrependScheme::Always => Prefix::Each,
                PrependScheme::Never => Prefix::None,
            }
        }
        PreTokenizerWrapper::ByteLevel(bytes) if bytes.add_prefix_space => {
            bytes.add_prefix_space = false;
            Prefix::Each
        }
        _ => Prefix::None,
    }
}
