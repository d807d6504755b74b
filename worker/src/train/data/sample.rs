//! Samples in tokens, and which of them are learned. Pure.

use std::ops::Range;

use carryon_crds::job::Overlong;

/// What a sample teaches.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// Positions of `ids` that are predicted, each from the position before it.
    Tokens(Range<usize>),
    /// Index of the label.
    Label(u32),
}

/// One sample.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sample {
    /// Token ids, at least one.
    pub ids: Vec<u32>,
    /// What is learned from them.
    pub target: Target,
}

impl Sample {
    /// Number of predictions: learned tokens, or one label.
    pub fn targets(&self) -> usize {
        match &self.target {
            Target::Tokens(range) => range.len(),
            Target::Label(_) => 1,
        }
    }

    /// Rows of the hidden states whose output is used: the position before each learned token, or all for a label.
    pub fn rows(&self) -> Range<usize> {
        match &self.target {
            Target::Tokens(range) => range.start - 1..range.end - 1,
            Target::Label(_) => 0..self.ids.len(),
        }
    }

    /// Ids (or the label's index) that the rows are to predict.
    pub fn wanted(&self) -> &[u32] {
        match &self.target {
            Target::Tokens(range) => &self.ids[range.clone()],
            Target::Label(label) => std::slice::from_ref(label),
        }
    }
}

/// The learned part of a conversation: `whole` is the rendered conversation, `prefix` the same up to and including the words that open the assistant's
/// last turn. Learned are the tokens after the prefix up to the first-from-the-end of `end`; what the template puts behind the end token is cut off.
pub fn completion(whole: Vec<u32>, prefix: &[u32], end: &[u32]) -> Result<Sample, String> {
    if !whole.starts_with(prefix) || prefix.is_empty() {
        let common = whole.iter().zip(prefix).take_while(|(a, b)| a == b).count();
        return Err(format!(
            "the chat template's prompt is not a token prefix of the conversation (they part at token {common} of {}): prompt and completion cannot be told apart",
            prefix.len()
        ));
    }
    let start = prefix.len();
    let stop = whole[start..].iter().rposition(|id| end.contains(id)).map_or(whole.len(), |last| start + last + 1);
    if stop == start {
        return Err("the completion has no tokens".to_owned());
    }
    let mut ids = whole;
    ids.truncate(stop);
    Ok(Sample { ids, target: Target::Tokens(start..stop) })
}

/// A sample whose tokens from `prompt_length` on are learned; the very first token has nothing to be predicted from.
pub fn from_prompt_length(ids: Vec<u32>, prompt_length: usize) -> Result<Sample, String> {
    let range = prompt_length.max(1)..ids.len();
    match range.is_empty() {
        true => Err(format!("{} tokens leave nothing to learn", ids.len())),
        false => Ok(Sample { target: Target::Tokens(range), ids }),
    }
}

/// What became of a sample that was checked against the longest length.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fitted {
    /// Short enough as it is.
    Whole(Sample),
    /// Cut at the end.
    Cut(Sample),
    /// Left out.
    Skipped,
    /// Left out because nothing that is learned would remain.
    Emptied,
}

/// Applies the policy for samples longer than `max_length`; the error says how long the sample is.
pub fn fit(mut sample: Sample, max_length: usize, overlong: Overlong) -> Result<Fitted, String> {
    if sample.ids.len() <= max_length {
        return Ok(Fitted::Whole(sample));
    }
    match overlong {
        Overlong::Fail => Err(format!("{} tokens, more than data.maxLength {max_length}", sample.ids.len())),
        Overlong::Skip => Ok(Fitted::Skipped),
        Overlong::Truncate => {
            sample.ids.truncate(max_length);
            if let Target::Tokens(range) = &mut sample.target {
                range.end = range.end.min(max_length);
                if range.start >= range.end {
                    return Ok(Fitted::Emptied);
                }
            }
            Ok(Fitted::Cut(sample))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const END: u32 = 2;

    #[test]
    fn learns_completion_and_end_token_only() {
        let sample = completion(vec![1, 10, 2, 11, 50, 51, END, 11], &[1, 10, 2, 11], &[END]).unwrap();
        assert_eq!(sample.wanted(), [50, 51, END]);
        assert_eq!(sample.rows(), 3..6);
        assert_eq!(sample.ids, [1, 10, 2, 11, 50, 51, END]);
    }

    #[test]
    fn refuses_a_prompt_that_is_no_token_prefix() {
        let problem = completion(vec![1, 10, 99, 50], &[1, 10, 11], &[END]).unwrap_err();
        assert!(problem.contains("part at token 2 of 3"), "{problem}");
    }

    #[test]
    fn never_learns_the_first_token() {
        assert_eq!(from_prompt_length(vec![5, 6, 7], 0).unwrap().rows(), 0..2);
        assert!(from_prompt_length(vec![5], 0).is_err());
    }

    #[test]
    fn applies_the_policy_for_long_samples() {
        let sample = || from_prompt_length(vec![1, 2, 3, 4, 5], 3).unwrap();
        assert_eq!(fit(sample(), 5, Overlong::Fail), Ok(Fitted::Whole(sample())));
        assert_eq!(fit(sample(), 4, Overlong::Fail), Err("5 tokens, more than data.maxLength 4".to_owned()));
        assert_eq!(fit(sample(), 4, Overlong::Skip), Ok(Fitted::Skipped));
        assert_eq!(fit(sample(), 4, Overlong::Truncate), Ok(Fitted::Cut(from_prompt_length(vec![1, 2, 3, 4], 3).unwrap())));
        assert_eq!(fit(sample(), 3, Overlong::Truncate), Ok(Fitted::Emptied));
    }

    #[test]
    fn a_cut_label_sample_keeps_its_label() {
        let sample = Sample { ids: vec![1, 2, 3], target: Target::Label(1) };
        let Fitted::Cut(cut) = fit(sample, 2, Overlong::Truncate).unwrap() else { panic!("not cut") };
        assert_eq!((cut.ids.len(), cut.rows(), cut.wanted()), (2, 0..2, &[1][..]));
    }
}
