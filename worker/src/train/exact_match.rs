//! Which answers to held-out prompts are right, by `evaluation.generation`.

use carryon_crds::job::Generation;
use carryon_crds::wire::{Figure, TrainConfig};
use fancy_regex::{Regex, RegexBuilder};
use futures::StreamExt as _;
use serde_json::Value;

use crate::text::Tokenizer;
use crate::train::answers::{Answers, asked, spread};
use crate::train::data::Samples;
use crate::train::error::TrainError;
use crate::train::figures::share;

/// Answers that are asked for at once.
const AT_ONCE: usize = 8;
/// Largest compiled expression, bytes.
const MAX_COMPILED: usize = 10 << 20;
/// Characters of a sample's answer that are shown of one that cannot be judged.
const SHOWN: usize = 200;

/// What is compared of two answers.
enum Compared {
    /// All but blank space around it.
    Whole,
    /// The last match.
    Match(Regex),
    /// A value of JSON.
    Field(String),
}

/// Judges answers.
pub struct ExactMatch {
    compared: Compared,
    longest: u32,
    samples: usize,
}

impl ExactMatch {
    /// The judge that a configuration asks for, if it does.
    ///
    /// # Errors
    /// An expression that is none.
    pub fn of(config: &TrainConfig) -> Result<Option<Self>, TrainError> {
        config.evaluation.generation.as_ref().map(Self::new).transpose().map_err(refused)
    }

    /// Checks before anything is trained that the samples which are to be asked have what is compared.
    ///
    /// # Errors
    /// Those of [`Self::of`]; a held-out sample whose own answer could not be right.
    pub fn check(config: &TrainConfig, samples: Option<&Samples>, tokenizer: &Tokenizer) -> Result<(), TrainError> {
        let Some(judge) = Self::of(config)? else { return Ok(()) };
        let samples = samples.ok_or_else(|| refused("there are no held-out samples".to_owned()))?;
        for index in spread(samples.len(), judge.samples) {
            let sample = samples.read(index)?;
            let expected = tokenizer.decode(asked(&sample).1);
            if judge.compared.of(&expected).is_none() {
                let (number, shown) = (index + 1, expected.chars().take(SHOWN).collect::<String>());
                return Err(refused(format!("the answer of held-out sample {number} {}: {shown:?}", judge.compared.lacks())));
            }
        }
        Ok(())
    }

    fn new(generation: &Generation) -> Result<Self, String> {
        let compared = match (&generation.regex, &generation.json_field) {
            (None, None) => Compared::Whole,
            (Some(_), Some(_)) => return Err("at most one of regex, jsonField may be set".to_owned()),
            (None, Some(pointer)) if pointer.is_empty() || pointer.starts_with('/') => Compared::Field(pointer.clone()),
            (None, Some(pointer)) => return Err(format!("jsonField {pointer:?} is no JSON Pointer: it begins with /")),
            (Some(pattern), None) => Compared::Match(
                RegexBuilder::new(pattern)
                    .delegate_size_limit(MAX_COMPILED)
                    .build()
                    .map_err(|error| format!("regex {pattern:?}: {error}"))?,
            ),
        };
        Ok(Self { compared, longest: generation.max_new_tokens, samples: generation.max_samples as usize })
    }

    /// Share of answers that are right, of the head that `answers` gives. `told` hears how many are there, and of how many.
    ///
    /// # Errors
    /// The pool does not answer; samples that cannot be read.
    pub async fn measure(
        &self,
        answers: &Answers<'_>,
        samples: &Samples,
        mut told: impl FnMut(u64, u64),
    ) -> Result<Option<Figure>, TrainError> {
        let chosen: Vec<usize> = spread(samples.len(), self.samples).collect();
        let judged = chosen.iter().map(async |&index| {
            let sample = samples.read(index)?;
            let (prompt, expected) = asked(&sample);
            let answer = answers.answer(prompt, self.longest, true).await?;
            Ok::<_, TrainError>(self.is_right(&answer.text, &answers.base.tokenizer.decode(expected)))
        });
        let mut judged = std::pin::pin!(futures::stream::iter(judged).buffer_unordered(AT_ONCE));
        let (mut right, mut done) = (0, 0);
        while let Some(judged) = judged.next().await {
            right += u64::from(judged?);
            done += 1;
            told(done, chosen.len() as u64);
        }
        Ok(share(right, done))
    }

    fn is_right(&self, answer: &str, expected: &str) -> bool {
        match (self.compared.of(answer), self.compared.of(expected)) {
            (Some(answer), Some(expected)) => same(&answer, &expected),
            _ => false,
        }
    }
}

impl Compared {
    /// What counts of a text; none where it has no such thing.
    fn of(&self, text: &str) -> Option<Value> {
        match self {
            Self::Whole => Some(text.trim().into()),
            // One that takes too many turns to search has no match.
            Self::Match(regex) => {
                let last = regex.captures_iter(text).map_while(Result::ok).last()?;
                last.get(1).or_else(|| last.get(0)).map(|found| found.as_str().trim().into())
            }
            Self::Field(pointer) => serde_json::from_str::<Value>(text.trim()).ok()?.pointer(pointer).cloned(),
        }
    }

    /// What is to be said of a text without.
    fn lacks(&self) -> String {
        match self {
            Self::Whole => "is empty".to_owned(),
            Self::Match(regex) => format!("has no match of regex {:?}", regex.as_str()),
            Self::Field(pointer) => format!("is no JSON with a value at jsonField {pointer:?}"),
        }
    }
}

fn refused(reason: String) -> TrainError {
    TrainError::Configuration(format!("evaluation.generation: {reason}"))
}

/// Whether two values are equal, numbers as numbers: 1 is 1.0.
fn same(one: &Value, other: &Value) -> bool {
    match (one, other) {
        (Value::Number(one), Value::Number(other)) => one == other || one.as_f64() == other.as_f64(),
        (Value::Array(one), Value::Array(other)) => one.len() == other.len() && one.iter().zip(other).all(|(one, other)| same(one, other)),
        (Value::Object(one), Value::Object(other)) => {
            one.len() == other.len() && one.iter().all(|(name, one)| other.get(name).is_some_and(|other| same(one, other)))
        }
        (one, other) => one == other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judge(members: serde_json::Value) -> Result<ExactMatch, String> {
        ExactMatch::new(&serde_json::from_value(members).unwrap())
    }

    #[test]
    fn answers_are_compared_as_a_whole_unless_told_otherwise() {
        let judge = judge(serde_json::json!({})).unwrap();
        assert!(judge.is_right(" 42\n", "42") && !judge.is_right("The answer is 42", "42") && !judge.is_right("42.", "42"));
    }

    #[test]
    fn of_an_expression_the_last_match_counts() {
        let judge = judge(serde_json::json!({"regex": r"#### *(-?[0-9.,]+)"})).unwrap();
        assert!(judge.is_right("2 + 2 = 4\n#### 5\n#### 4", "Two and two are four.\n####4"));
        assert!(!judge.is_right("#### 4\n#### 5", "#### 4") && !judge.is_right("4", "#### 4"));
        let whole = self::judge(serde_json::json!({"regex": "yes|no"})).unwrap();
        assert!(whole.is_right("no, yes", "yes") && !whole.is_right("maybe", "maybe"));
        assert!(self::judge(serde_json::json!({"regex": "("})).err().unwrap().starts_with("regex \"(\": "));
    }

    #[test]
    fn an_expression_that_never_ends_has_no_match() {
        let judge = judge(serde_json::json!({"regex": r"(a*)*\1b"})).unwrap();
        assert!(!judge.is_right(&"a".repeat(200), "aab"));
    }

    #[test]
    fn of_json_a_field_counts() {
        let judge = judge(serde_json::json!({"jsonField": "/order/items"})).unwrap();
        let wanted = r#"{"order": {"items": [{"id": 1, "price": 2.50}]}, "note": "b"}"#;
        assert!(judge.is_right(r#" {"order": {"items": [{"price": 2.5, "id": 1.0}]}} "#, wanted));
        for wrong in [r#"{"order": {"items": []}}"#, r#"{"order": {"items": [{"id": 1}]}}"#, r#"{"order": null}"#, "[", ""] {
            assert!(!judge.is_right(wrong, wanted), "{wrong}");
        }
        assert_eq!(
            self::judge(serde_json::json!({"jsonField": "order"})).err().unwrap(),
            "jsonField \"order\" is no JSON Pointer: it begins with /"
        );
    }
}
