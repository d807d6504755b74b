//! Samples in tokens, and which of them are learned. Pure.

use std::ops::Range;

use carryon_crds::job::Overlong;

/// What a sample teaches.
#[derive(Clone, Debug, PartialEq)]
pub enum Target {
    /// Positions of `ids` that are predicted, each from the position before it: ascending, none empty, none with the first.
    Tokens(Vec<Range<usize>>),
    /// Index of the label.
    Label(u32),
    /// Indices of all labels, ascending.
    Labels(Vec<u32>),
    /// A number.
    Value(f64),
    /// Nothing by itself: this is number so much of a group of texts that are compared.
    Part(u32),
    /// The same, of answers that are compared by how likely their tokens are: those at these positions.
    Answer(u32, Range<usize>),
}

impl From<Range<usize>> for Target {
    fn from(range: Range<usize>) -> Self {
        Self::Tokens(vec![range])
    }
}

/// One sample.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    /// Token ids, at least one.
    pub ids: Vec<u32>,
    /// What is learned from them.
    pub target: Target,
}

impl Sample {
    /// Number of predictions: learned tokens, or one for a whole text or group of them.
    pub fn targets(&self) -> usize {
        match &self.target {
            Target::Tokens(ranges) => ranges.iter().map(Range::len).sum(),
            Target::Answer(_, range) => range.len(),
            Target::Part(part) => usize::from(*part == 0),
            _ => 1,
        }
    }

    /// Rows of the hidden states whose output is used: the position before each learned token, or all where a whole text is judged.
    pub fn rows(&self) -> Vec<Range<usize>> {
        match &self.target {
            Target::Tokens(ranges) => ranges.iter().map(|range| range.start - 1..range.end - 1).collect(),
            Target::Answer(_, range) => std::iter::once(range.start - 1..range.end - 1).collect(),
            _ => std::iter::once(0..self.ids.len()).collect(),
        }
    }

    /// Whether its rows are to predict tokens.
    pub fn predicts_tokens(&self) -> bool {
        matches!(self.target, Target::Tokens(_) | Target::Answer(..))
    }

    /// Ids (or the one label's index) that the rows are to predict.
    pub fn wanted(&self) -> Vec<u32> {
        match &self.target {
            Target::Tokens(ranges) => ranges.iter().flat_map(|range| &self.ids[range.clone()]).copied().collect(),
            Target::Answer(_, range) => self.ids[range.clone()].to_vec(),
            Target::Label(label) => vec![*label],
            Target::Labels(_) | Target::Value(_) | Target::Part(_) => Vec::new(),
        }
    }
}

/// A sample whose tokens from `prompt_length` on are learned; the very first token has nothing to be predicted from.
pub fn from_prompt_length(ids: Vec<u32>, prompt_length: usize) -> Result<Sample, String> {
    let range = prompt_length.max(1)..ids.len();
    match range.is_empty() {
        true => Err(format!("{} tokens leave nothing to learn", ids.len())),
        false => Ok(Sample { target: range.into(), ids }),
    }
}

/// What became of a sample that was checked against the longest length.
#[derive(Clone, Debug, PartialEq)]
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
            // Of a long document little is kept.
            sample.ids.shrink_to_fit();
            match &mut sample.target {
                Target::Tokens(ranges) => {
                    ranges.retain(|range| range.start < max_length);
                    let Some(last) = ranges.last_mut() else { return Ok(Fitted::Emptied) };
                    last.end = last.end.min(max_length);
                }
                Target::Answer(_, range) if range.start >= max_length => return Ok(Fitted::Emptied),
                Target::Answer(_, range) => range.end = range.end.min(max_length),
                _ => {}
            }
            Ok(Fitted::Cut(sample))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_learned_token_is_predicted_from_the_position_before_it() {
        let sample = Sample { ids: vec![1, 10, 50, 2, 11, 51, 2], target: Target::Tokens(vec![2..4, 5..7]) };
        assert_eq!((sample.wanted(), sample.targets()), (vec![50, 2, 51, 2], 4));
        assert_eq!(sample.rows(), [1..3, 4..6]);
        let Ok(Fitted::Cut(cut)) = fit(sample.clone(), 6, Overlong::Truncate) else { panic!("not cut") };
        assert_eq!((cut.ids.len(), cut.target), (6, Target::Tokens(vec![2..4, 5..6])));
        let Ok(Fitted::Cut(cut)) = fit(sample, 5, Overlong::Truncate) else { panic!("not cut") };
        assert_eq!(cut.target, Target::from(2..4), "no turn is learned of which nothing is left");
    }

    #[test]
    fn never_learns_the_first_token() {
        assert_eq!(from_prompt_length(vec![5, 6, 7], 0).unwrap().rows(), std::slice::from_ref(&(0..2)));
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
        assert_eq!((cut.ids.len(), cut.rows(), cut.wanted()), (2, vec![0..2; 1], vec![1]));
    }
}
