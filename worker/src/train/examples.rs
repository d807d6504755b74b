//! The same held-out prompts with and without the head, for the report: answered by the pool that would serve them.

use carryon_crds::wire::ModelDescription;

use crate::text::Tokenizer;
use crate::train::answers::{Answer, Answers, asked, spread};
use crate::train::data::Samples;
use crate::train::error::TrainError;
use crate::train::pool::Base;
use crate::train::report::Example;

/// Prompts shown.
const EXAMPLES: usize = 3;
/// Longest answer, tokens.
const LONGEST: u32 = 160;

/// Greedy answers to some prompts of `samples`, without the head and with it.
///
/// # Errors
/// The pool does not answer.
pub async fn compare(answers: &Answers<'_>, samples: &Samples) -> Result<Vec<Example>, TrainError> {
    let Base { tokenizer, description, .. } = answers.base;
    let chosen = spread(samples.len(), EXAMPLES).map(|index| samples.read(index)).collect::<Result<Vec<_>, _>>()?;
    let examples = chosen.iter().map(async |sample| {
        let (prompt, expected) = asked(sample);
        let shown = |Answer { text, cut }| if cut { text + " …" } else { text };
        let (without, with) = futures::try_join!(answers.answer(prompt, LONGEST, false), answers.answer(prompt, LONGEST, true))?;
        Ok(Example {
            prompt: visible(tokenizer, description, prompt),
            expected: tokenizer.decode(expected),
            base: shown(without),
            head: shown(with),
        })
    });
    futures::future::try_join_all(examples).await
}

/// The prompt as a person reads it: without the template's words before the last turn of the user where they can be told apart.
fn visible(tokenizer: &Tokenizer, base: &ModelDescription, prompt: &[u32]) -> String {
    let turns: Vec<&[u32]> = prompt.split(|id| base.eos_token_ids.contains(id)).collect();
    let text = match turns.as_slice() {
        [.., user, _] => tokenizer.decode(user),
        _ => tokenizer.decode(prompt),
    };
    let text = text.trim();
    text.strip_prefix("user\n").unwrap_or(text).to_owned()
}
