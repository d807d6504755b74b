//! Data sets: JSON Lines to token samples, with every refusal naming file and line.

mod lines;
mod record;
mod sample;

use std::path::Path;

use carryon_crds::job::{DataFormat, Overlong, Task};
use serde::{Deserialize, Serialize};

pub use lines::{MAX_FILE_BYTES, MAX_LINE_BYTES, file_digest};
pub use record::Turn;
pub use sample::{Sample, Target};

use crate::train::error::DataError;
use lines::Lines;
use record::Record;
use sample::Fitted;

/// The base's words: its tokenizer and chat template.
pub trait Language {
    /// Token ids of `text`; control tokens written in it are recognised. With `special` also those the tokenizer puts around a text.
    fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>, String>;
    /// The conversation in the base's template; with `open_answer` followed by the words that open the assistant's turn.
    fn render(&self, turns: &[Turn], open_answer: bool) -> Result<String, String>;
}

/// How a file becomes samples.
#[derive(Clone, Copy, Debug)]
pub struct Rules<'a> {
    /// What the head learns.
    pub task: Task,
    /// What a line holds.
    pub format: DataFormat,
    /// Longest sample in tokens.
    pub max_length: usize,
    /// What happens to a longer one.
    pub overlong: Overlong,
    /// Ids must be below this.
    pub vocab_size: u32,
    /// Tokens that end an answer.
    pub end_tokens: &'a [u32],
    /// Label names of task Classification.
    pub labels: &'a [String],
}

/// What was read from one file.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    /// Samples kept.
    pub samples: u64,
    /// Their tokens.
    pub tokens: u64,
    /// Tokens (or labels) learned.
    pub targets: u64,
    /// Samples cut at `maxLength`.
    pub truncated: u64,
    /// Samples left out because they were longer.
    pub skipped: u64,
    /// Samples left out because the cut took all that is learned.
    pub emptied: u64,
    /// Tokens of the longest sample kept.
    pub longest: u64,
}

/// The samples of one file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DataSet {
    /// In the order of the lines.
    pub samples: Vec<Sample>,
    /// What was read.
    pub counts: Counts,
}

impl DataSet {
    /// Tokens of each sample.
    pub fn lengths(&self) -> Vec<usize> {
        self.samples.iter().map(|sample| sample.ids.len()).collect()
    }
}

/// Reads `path`; `progress` is told the number of lines and bytes now and then.
pub fn load(path: &Path, rules: &Rules<'_>, language: &dyn Language, progress: &mut dyn FnMut(u64, u64)) -> Result<DataSet, DataError> {
    let mut lines = Lines::open(path)?;
    let mut data = DataSet::default();
    let mut format = rules.format;
    while let Some(line) = lines.next_line()? {
        let read = |format: &mut DataFormat| -> Result<Fitted, String> {
            if *format == DataFormat::Auto {
                *format = record::detect(line)?;
            }
            check_task(*format, rules.task)?;
            let sample = encode(record::parse(line, *format)?, rules, language)?;
            check_ids(&sample, rules.vocab_size)?;
            sample::fit(sample, rules.max_length, rules.overlong)
        };
        let fitted = read(&mut format);
        match fitted.map_err(|problem| lines.error(problem))? {
            Fitted::Whole(sample) => data.push(sample),
            Fitted::Cut(sample) => {
                data.counts.truncated += 1;
                data.push(sample);
            }
            Fitted::Skipped => data.counts.skipped += 1,
            Fitted::Emptied => data.counts.emptied += 1,
        }
        if lines.number() % 64 == 0 {
            progress(lines.number(), lines.bytes());
        }
    }
    match data.samples.is_empty() {
        true => {
            Err(DataError::Empty { path: path.to_owned(), lines: lines.number() - 1, skipped: data.counts.skipped + data.counts.emptied })
        }
        false => Ok(data),
    }
}

impl DataSet {
    fn push(&mut self, sample: Sample) {
        self.counts.samples += 1;
        self.counts.tokens += sample.ids.len() as u64;
        self.counts.targets += sample.targets() as u64;
        self.counts.longest = self.counts.longest.max(sample.ids.len() as u64);
        self.samples.push(sample);
    }
}

/// Labels are for classifiers, and classifiers need labels.
pub fn check_task(format: DataFormat, task: Task) -> Result<(), String> {
    match (format, task) {
        (DataFormat::TextLabel, Task::CausalLM) => {
            Err("`text` and `label` are data of task Classification; the task is CausalLM".to_owned())
        }
        (DataFormat::TextLabel | DataFormat::Auto, Task::Classification) | (_, Task::CausalLM) => Ok(()),
        (_, Task::Classification) => Err("task Classification needs `text` and `label`".to_owned()),
    }
}

fn encode(record: Record, rules: &Rules<'_>, language: &dyn Language) -> Result<Sample, String> {
    match record {
        Record::Tokens { input_ids, prompt_length } => sample::from_prompt_length(input_ids, prompt_length),
        Record::Text(text) => sample::from_prompt_length(language.encode(&text, true)?, 0),
        Record::Labelled { text, label } => {
            let known = rules.labels.iter().position(|name| *name == label);
            let label = known.ok_or_else(|| format!("field `label` is {label:?}, head.labels has {}", rules.labels.join(", ")))?;
            let ids = language.encode(&text, true)?;
            match ids.is_empty() {
                true => Err("field `text` has no tokens".to_owned()),
                false => Ok(Sample { ids, target: Target::Label(label as u32) }),
            }
        }
        Record::Chat(turns) => {
            let whole = language.encode(&language.render(&turns, false)?, false)?;
            let prefix = language.encode(&language.render(&turns[..turns.len() - 1], true)?, false)?;
            sample::completion(whole, &prefix, rules.end_tokens)
        }
    }
}

fn check_ids(sample: &Sample, vocab_size: u32) -> Result<(), String> {
    match sample.ids.iter().position(|&id| id >= vocab_size) {
        Some(index) => Err(format!("token {index} is {}, the base's vocabulary has {vocab_size}", sample.ids[index])),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One token a byte; turns are `<role>content;`.
    struct Bytes;

    impl Language for Bytes {
        fn encode(&self, text: &str, _: bool) -> Result<Vec<u32>, String> {
            Ok(text.bytes().map(u32::from).collect())
        }
        fn render(&self, turns: &[Turn], open_answer: bool) -> Result<String, String> {
            let mut text: String = turns.iter().map(|turn| format!("<{}>{};\n", turn.role, turn.content)).collect();
            if open_answer {
                text.push_str("<assistant>");
            }
            Ok(text)
        }
    }

    const END: &[u32] = &[b';' as u32];

    fn rules(task: Task, labels: &[String]) -> Rules<'_> {
        Rules { task, format: DataFormat::Auto, max_length: 64, overlong: Overlong::Truncate, vocab_size: 256, end_tokens: END, labels }
    }

    fn read(content: &str, rules: &Rules<'_>) -> Result<DataSet, DataError> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), content).unwrap();
        load(file.path(), rules, &Bytes, &mut |_, _| {})
    }

    fn text(ids: &[u32]) -> String {
        ids.iter().map(|&id| char::from(id as u8)).collect()
    }

    #[test]
    fn the_mask_is_completion_and_end_token() {
        let line = r#"{"messages":[{"role":"user","content":"a;b?"},{"role":"assistant","content":"x;y"}]}"#;
        let data = read(line, &rules(Task::CausalLM, &[])).unwrap();
        assert_eq!(text(data.samples[0].wanted()), "x;y;");
        assert_eq!(text(&data.samples[0].ids), "<user>a;b?;\n<assistant>x;y;");
    }

    #[test]
    fn counts_what_the_policy_did() {
        let long = "z".repeat(100);
        let content = format!("{{\"text\":\"{long}\"}}\n{{\"text\":\"short\"}}\n");
        let data = read(&content, &rules(Task::CausalLM, &[])).unwrap();
        assert_eq!(data.counts, Counts { samples: 2, tokens: 69, targets: 67, truncated: 1, longest: 64, ..Counts::default() });
        let data = read(&content, &Rules { overlong: Overlong::Skip, ..rules(Task::CausalLM, &[]) }).unwrap();
        assert_eq!((data.counts.samples, data.counts.skipped), (1, 1));
        let error = read(&content, &Rules { overlong: Overlong::Fail, ..rules(Task::CausalLM, &[]) }).unwrap_err().to_string();
        assert!(error.ends_with("line 1: 100 tokens, more than data.maxLength 64"), "{error}");
    }

    #[test]
    fn a_line_of_another_format_is_named() {
        let error =
            read("{\"text\":\"a b\"}\n{\"prompt\":\"a\",\"completion\":\"b\"}\n", &rules(Task::CausalLM, &[])).unwrap_err().to_string();
        assert!(error.ends_with("line 2: field `text` is missing"), "{error}");
    }

    #[test]
    fn ids_beyond_the_vocabulary_are_refused() {
        let error = read("{\"input_ids\":[1,2,300],\"prompt_length\":1}\n", &rules(Task::CausalLM, &[])).unwrap_err().to_string();
        assert!(error.ends_with("line 1: token 2 is 300, the base's vocabulary has 256"), "{error}");
    }

    #[test]
    fn labels_are_checked_by_name() {
        let labels = ["ham".to_owned(), "spam".to_owned()];
        let data = read("{\"text\":\"buy\",\"label\":\"spam\"}\n", &rules(Task::Classification, &labels)).unwrap();
        assert_eq!(data.samples[0].target, Target::Label(1));
        let error = read("{\"text\":\"buy\",\"label\":\"eggs\"}\n", &rules(Task::Classification, &labels)).unwrap_err().to_string();
        assert!(error.ends_with("line 1: field `label` is \"eggs\", head.labels has ham, spam"), "{error}");
    }

    #[test]
    fn format_and_task_must_fit() {
        let error = read("{\"text\":\"buy\"}\n", &rules(Task::Classification, &[])).unwrap_err().to_string();
        assert!(error.ends_with("line 1: task Classification needs `text` and `label`"), "{error}");
    }

    #[test]
    fn a_file_without_samples_is_refused() {
        let error = read("\n\n", &rules(Task::CausalLM, &[])).unwrap_err().to_string();
        assert!(error.contains("holds no usable sample (2 lines, 0 left out)"), "{error}");
    }
}
