//! The vocabulary of a GGUF file that was made with SentencePiece: pieces with scores. What it joins first is the pair that makes the piece of
//! the best score; the same in merges is what transformers makes of it.

use std::cmp::Reverse;

use tokenizers::AddedToken;
use tokenizers::models::bpe::{BPE, Merges, Vocab};
use tokenizers::normalizers::{Prepend, Replace, Sequence};
use tokenizers::{DecoderWrapper, NormalizerWrapper};

use super::TextError;
use super::vocabulary::{CONTROL, USER_DEFINED, Vocabulary, unusable};

/// What such a vocabulary says beside its tokens.
#[derive(Clone, Debug, Default)]
pub struct Pieces {
    /// `scores` of each id: the higher, the sooner it is joined.
    pub scores: Vec<f32>,
    /// `add_space_prefix`: whether a text, and what is behind a control token, begins with a blank.
    pub add_space_prefix: bool,
    /// Whether control tokens take the blanks behind them along, as Phi-3's do. No key says so.
    pub strips: bool,
}

const UNKNOWN: u32 = 2;
/// Longer pieces are joined from nothing: no publisher's is a tenth as long.
const MAX_PIECE_BYTES: usize = 1024;

pub(super) fn build(vocabulary: &Vocabulary, pieces: &Pieces) -> Result<tokenizers::Tokenizer, TextError> {
    let tokens = vocabulary.ids()?;
    if pieces.scores.len() != vocabulary.tokens.len() {
        return Err(unusable(format!("{} tokens, but {} scores", vocabulary.tokens.len(), pieces.scores.len())));
    }
    let unknown = vocabulary.token_types.iter().position(|kind| *kind == UNKNOWN).map(|id| vocabulary.tokens[id].clone());
    let merges = merges(vocabulary, &tokens, &pieces.scores);
    let mut model = BPE::builder().vocab_and_merges(tokens, merges).fuse_unk(true).byte_fallback(true);
    if let Some(unknown) = unknown {
        model = model.unk_token(unknown);
    }
    let mut tokenizer = tokenizers::Tokenizer::new(model.build().map_err(unusable)?);
    let blank = || Replace::new(" ", "\u{2581}").map(NormalizerWrapper::from);
    let mut normalizers = vec![blank().map_err(unusable)?];
    let mut decoders = vec![
        DecoderWrapper::from(Replace::new("\u{2581}", " ").map_err(unusable)?),
        tokenizers::decoders::byte_fallback::ByteFallback::new().into(),
        tokenizers::decoders::fuse::Fuse::new().into(),
    ];
    if pieces.add_space_prefix {
        normalizers.insert(0, Prepend::new("\u{2581}".to_owned()).into());
        decoders.push(tokenizers::decoders::strip::Strip::new(' ', 1, 0).into());
    }
    tokenizer.with_normalizer(Some(Sequence::new(normalizers))).map_err(unusable)?;
    tokenizer.with_decoder(Some(tokenizers::decoders::sequence::Sequence::new(decoders)));
    let of = |kinds: &'static [u32]| vocabulary.tokens.iter().zip(&vocabulary.token_types).filter(|(_, kind)| kinds.contains(kind));
    let strips = |token: &str| pieces.strips && !["<unk>", "<s>", "<|endoftext|>"].contains(&token);
    let special = of(&[CONTROL, UNKNOWN]).map(|(token, _)| AddedToken::from(token.as_str(), true).normalized(false).rstrip(strips(token)));
    tokenizer.add_special_tokens(special).map_err(unusable)?;
    tokenizer
        .add_tokens(of(&[USER_DEFINED]).map(|(token, _)| AddedToken::from(token.as_str(), false).normalized(false).rstrip(pieces.strips)))
        .map_err(unusable)?;
    Ok(tokenizer)
}

/// Every pair of pieces that is a piece, best first; of the same piece's pairs, that with the longest left part.
fn merges(vocabulary: &Vocabulary, ids: &Vocab, scores: &[f32]) -> Merges {
    let mut pairs: Vec<(f32, &str, &str)> = Vec::new();
    for (token, score) in vocabulary.tokens.iter().zip(scores).filter(|(token, _)| token.len() <= MAX_PIECE_BYTES) {
        let whole = pairs.len();
        let places = token.char_indices().skip(1).map(|(place, _)| token.split_at(place));
        pairs.extend(
            places.filter(|(left, right)| ids.contains_key(*left) && ids.contains_key(*right)).map(|(left, right)| (*score, left, right)),
        );
        pairs[whole..].sort_by_key(|(_, left, right)| (ids[*left], ids[*right]));
    }
    let length = |text: &str| Reverse(text.chars().count());
    pairs.sort_by(|one, other| {
        let shape = |(_, left, right): &(f32, &str, &str)| (length(left), length(right));
        other.0.total_cmp(&one.0).then_with(|| shape(one).cmp(&shape(other)))
    });
    pairs.into_iter().map(|(_, left, right)| (left.to_owned(), right.to_owned())).collect()
}
