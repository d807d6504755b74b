//! The vocabulary of a GGUF file, and the pre-tokenizer that its name stands for.

use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::normalizers::NFC;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{AddedToken, PreTokenizerWrapper, SplitDelimiterBehavior};

use super::TextError;
use super::pieces::{self, Pieces};

/// What a GGUF file says of its BPE tokenizer (`tokenizer.ggml.*`).
#[derive(Clone, Debug, Default)]
pub struct Vocabulary {
    /// `tokens`: text of each id, in the byte-level alphabet, or as SentencePiece writes it.
    pub tokens: Vec<String>,
    /// `merges`: `LEFT RIGHT`, by rank; of a byte-level vocabulary only.
    pub merges: Vec<String>,
    /// What one of SentencePiece (`model` is `llama`) has instead.
    pub pieces: Option<Pieces>,
    /// `token_type` of each id: 1 normal, 3 control, 4 user-defined.
    pub token_types: Vec<u32>,
    /// `pre`: name of the pre-tokenizer.
    pub pre: Option<String>,
    /// `bos_token_id`.
    pub bos: Option<u32>,
    /// `eos_token_id`.
    pub eos: Option<u32>,
    /// `add_bos_token`: whether a text starts with the beginning-of-sequence token.
    pub add_bos: bool,
    /// `tokenizer.chat_template`.
    pub chat_template: Option<String>,
}

pub(super) const CONTROL: u32 = 3;
pub(super) const USER_DEFINED: u32 = 4;
/// As many tokens as no vocabulary has.
const MAX_TOKENS: usize = 4 << 20;

impl Vocabulary {
    /// Text of an id.
    pub fn token(&self, id: u32) -> Option<&str> {
        self.tokens.get(id as usize).map(String::as_str)
    }

    pub(super) fn build(&self) -> Result<tokenizers::Tokenizer, TextError> {
        let mut tokenizer = match &self.pieces {
            Some(pieces) => pieces::build(self, pieces)?,
            None => self.build_byte_level()?,
        };
        if self.add_bos {
            tokenizer.with_post_processor(Some(self.begin()?));
        }
        Ok(tokenizer)
    }

    fn build_byte_level(&self) -> Result<tokenizers::Tokenizer, TextError> {
        let scheme = self.scheme()?;
        let mut tokenizer = tokenizers::Tokenizer::new(self.model(scheme.ignore_merges)?);
        if scheme.compose {
            tokenizer.with_normalizer(Some(NFC)).map_err(unusable)?;
        }
        tokenizer.with_pre_tokenizer(Some(scheme.pre_tokenizer));
        tokenizer.with_decoder(Some(ByteLevel::new(false, true, true)));
        self.add_tokens(&mut tokenizer)?;
        Ok(tokenizer)
    }

    /// The id of each token, of which no two are the same.
    pub(super) fn ids(&self) -> Result<Vocab, TextError> {
        let count = self.tokens.len();
        if count == 0 || count > MAX_TOKENS || self.merges.len() > MAX_TOKENS {
            return Err(unusable(format!("{count} tokens and {} merges", self.merges.len())));
        }
        if self.token_types.len() != count {
            return Err(unusable(format!("{count} tokens, but {} token types", self.token_types.len())));
        }
        let mut vocabulary = Vocab::with_capacity(count);
        for (id, token) in self.tokens.iter().enumerate() {
            if let Some(first) = vocabulary.insert(token.clone(), id as u32) {
                return Err(unusable(format!("tokens {first} and {id} are both {token:?}")));
            }
        }
        Ok(vocabulary)
    }

    fn model(&self, ignore_merges: bool) -> Result<BPE, TextError> {
        let vocabulary = self.ids()?;
        let longest = self.tokens.iter().map(String::len).max().unwrap_or(0);
        let mut merges = Vec::with_capacity(self.merges.len());
        for (rank, merge) in self.merges.iter().enumerate() {
            let pair = merge.split_once(' ').ok_or_else(|| unusable(format!("merge {rank} is not a pair: {merge:?}")))?;
            // The library would end the process over it.
            if pair.0.len() + pair.1.len() > longest {
                return Err(unusable(format!("merge {rank} is longer than any token: {merge:?}")));
            }
            merges.push((pair.0.to_owned(), pair.1.to_owned()));
        }
        BPE::builder().vocab_and_merges(vocabulary, merges).ignore_merges(ignore_merges).build().map_err(unusable)
    }

    fn add_tokens(&self, tokenizer: &mut tokenizers::Tokenizer) -> Result<(), TextError> {
        let of_type =
            |wanted: u32| self.tokens.iter().zip(&self.token_types).filter(move |(_, kind)| **kind == wanted).map(|(token, _)| token);
        let added = |token: &String, special| AddedToken::from(token.as_str(), special).normalized(false);
        tokenizer.add_special_tokens(of_type(CONTROL).map(|token| added(token, true))).map_err(unusable)?;
        tokenizer.add_tokens(of_type(USER_DEFINED).map(|token| added(token, false))).map_err(unusable)?;
        Ok(())
    }

    fn begin(&self) -> Result<TemplateProcessing, TextError> {
        let id = self.bos.ok_or_else(|| unusable("add_bos_token without bos_token_id"))?;
        let token = self.token(id).ok_or_else(|| unusable(format!("bos_token_id {id} is no token")))?;
        TemplateProcessing::builder()
            .try_single(format!("{token} $A"))
            .and_then(|builder| builder.try_pair(format!("{token} $A {token} $B")))
            .map_err(unusable)?
            .special_tokens(vec![(token, id)])
            .build()
            .map_err(unusable)
    }

    /// What the name in `pre` stands for; a name we are not sure of is refused, for a wrong guess changes tokens silently.
    fn scheme(&self) -> Result<Scheme, TextError> {
        let name = self.pre.as_deref().ok_or_else(|| unusable("no pre-tokenizer is named (tokenizer.ggml.pre)"))?;
        match name {
            "smollm" | "starcoder" | "refact" | "command-r" => {
                Ok(Scheme::plain(Sequence::new(vec![Digits::new(true).into(), gpt2().into()])))
            }
            "gpt-2" | "gpt2" | "phi-2" | "olmo" | "mpt" => Ok(Scheme::plain(gpt2())),
            "llama-bpe" | "llama3" | "llama-v3" => Ok(Scheme { ignore_merges: true, ..Scheme::plain(split(&[LLAMA3])?) }),
            // GLM-4; OLMo 2 and Phi-4 are as DBRX is.
            "glm4" | "chatglm-bpe" | "dbrx" | "smaug-bpe" => Ok(Scheme::plain(split(&[LLAMA3])?)),
            "qwen2" | "deepseek-r1-qwen" => Ok(Scheme { compose: true, ..Scheme::plain(split(&[QWEN2])?) }),
            "deepseek-v3" => Ok(Scheme::plain(split(&DEEPSEEK3)?)),
            "tekken" => Ok(Scheme { ignore_merges: true, ..Scheme::plain(split(&[TEKKEN])?) }),
            other => Err(unusable(format!("unknown pre-tokenizer {other:?}"))),
        }
    }
}

const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Mistral's since Nemo.
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// DeepSeek's since V3, one behind the other.
const DEEPSEEK3: [&str; 3] = [
    r"\p{N}{1,3}",
    r"[一-龥\u3040-ゟ゠-ヿ]+",
    r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"##,
];

struct Scheme {
    pre_tokenizer: PreTokenizerWrapper,
    /// Whether a word that is a token needs no merges to become it.
    ignore_merges: bool,
    /// Whether text is composed (NFC) first.
    compose: bool,
}

impl Scheme {
    fn plain(pre_tokenizer: impl Into<PreTokenizerWrapper>) -> Self {
        Self { pre_tokenizer: pre_tokenizer.into(), ignore_merges: false, compose: false }
    }
}

fn gpt2() -> ByteLevel {
    ByteLevel::new(false, true, true)
}

fn split(patterns: &[&str]) -> Result<Sequence, TextError> {
    let split = |pattern: &&str| Split::new(SplitPattern::Regex((*pattern).to_owned()), SplitDelimiterBehavior::Isolated, false);
    let splits = patterns.iter().map(|pattern| split(pattern).map(PreTokenizerWrapper::from));
    let bytes = ByteLevel::new(false, true, false).into();
    Ok(Sequence::new(splits.chain([Ok(bytes)]).collect::<Result<_, _>>().map_err(unusable)?))
}

pub(super) fn unusable(reason: impl ToString) -> TextError {
    TextError::Vocabulary(reason.to_string())
}
