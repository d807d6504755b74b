//! Data sets: JSON Lines and tables to token samples, with every refusal naming file and line.

mod balance;
mod dataset;
mod encode;
mod files;
mod label;
mod lines;
mod preference;
mod problem;
mod record;
mod rows;
mod sample;
mod store;
mod strict;
mod table;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use carryon_crds::job::{DataFormat, OnError, Overlong, Targets, Task, Thinking};
use serde::{Deserialize, Serialize};

pub use balance::Balance;
pub use dataset::Part;
pub use files::Files;
pub use lines::{MAX_FILE_BYTES, MAX_LINE_BYTES};
pub use sample::{Sample, Target};
pub use store::Samples;

use crate::text::{ChatTemplate, Tokenizer};
use crate::train::error::{DataError, TrainError};
use problem::Problem;
use rows::Rows;
use sample::Fitted;
use store::Writer;

/// Most lines left out that are named.
const MAX_REFUSALS: usize = 20;
/// Longest that is said of one, characters.
const MAX_REFUSAL_CHARS: usize = 400;

/// The base's words: its tokenizer and chat template.
#[derive(Clone, Copy)]
pub struct Language<'a> {
    /// The tokenizer.
    pub tokenizer: &'a Tokenizer,
    /// The chat template, if it has one.
    pub template: Option<&'a ChatTemplate>,
}

/// How a file becomes samples.
#[derive(Clone, Copy, Debug)]
pub struct Rules<'a> {
    /// What the head learns.
    pub task: Task,
    /// What a line holds.
    pub format: DataFormat,
    /// Which turns of a chat are learned.
    pub targets: Targets,
    /// Whether what the assistant thought is part of a chat.
    pub thinking: Thinking,
    /// Whether control tokens in the contents of a chat are text like any other.
    pub split_special_tokens: bool,
    /// What is put behind a plain text, if anything.
    pub text_end: Option<u32>,
    /// Longest sample in tokens.
    pub max_length: usize,
    /// What happens to a longer one.
    pub overlong: Overlong,
    /// What happens to a line that cannot be read.
    pub on_error: OnError,
    /// Ids must be below this.
    pub vocab_size: u32,
    /// Tokens that end an answer.
    pub end_tokens: &'a [u32],
    /// Label names of tasks that have them.
    pub labels: &'a [String],
}

/// What was read.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
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
    /// Lines left out because they could not be read.
    #[serde(default)]
    pub refused: u64,
    /// Which, and why: the first of them.
    #[serde(default)]
    pub refusals: Vec<String>,
    /// Tokens of the longest sample kept.
    pub longest: u64,
    /// Members of lines and turns that nobody reads, and how often they came.
    #[serde(default)]
    pub ignored: BTreeMap<String, u64>,
    /// How labels are spread over the samples kept.
    #[serde(default)]
    pub balance: Balance,
}

/// The samples of a split.
#[derive(Clone, Debug)]
pub struct DataSet {
    /// In the order of the lines; shared with those who train on them.
    pub samples: Arc<Samples>,
    /// What was read.
    pub counts: Counts,
}

/// Reads `paths`, one after the other, and keeps their samples in a file without a name in `folder`; `progress` is told the number of bytes now and then, and ends it by an error.
pub fn load(
    paths: &[PathBuf],
    rules: &Rules<'_>,
    language: Language<'_>,
    folder: &Path,
    progress: &mut dyn FnMut(u64) -> Result<(), TrainError>,
) -> Result<DataSet, TrainError> {
    let mut data = Reader { samples: Writer::new(folder)?, counts: Counts::default() };
    let (mut count, mut before) = (0, 0);
    for path in paths {
        let mut rows = Rows::open(path)?;
        let mut format = rules.format;
        loop {
            let read = match rows.next_row() {
                Ok(None) => break,
                Ok(Some(row)) => data.understand(row, &mut format, rules, language).map_err(|problem| rows.error(problem)),
                Err(error) => Err(error),
            };
            match read {
                Ok(samples) if rules.task.group() == 1 => samples.into_iter().try_for_each(|fitted| data.keep(fitted))?,
                Ok(group) => data.keep_group(group)?,
                Err(error) => data.counts.refuse(error, rules.on_error)?,
            }
            if rows.number().is_multiple_of(64) {
                progress(before + rows.bytes())?;
            }
        }
        count += rows.count();
        before += rows.bytes();
    }
    let Counts { skipped, emptied, refused, refusals, .. } = &data.counts;
    match data.counts.samples {
        0 => {
            let (skipped, first) = (skipped + emptied + refused, refusals.first().cloned());
            Err(DataError::Empty { paths: paths.to_owned(), lines: count, skipped, first }.into())
        }
        _ => Ok(DataSet { samples: Arc::new(data.samples.finish(rules.task.group() as usize)?), counts: data.counts }),
    }
}

/// A split that is being read.
struct Reader {
    samples: Writer,
    counts: Counts,
}

impl Reader {
    /// The samples of one line. A file's first decides on the format of all, where the rules do not.
    fn understand(
        &mut self,
        line: &str,
        format: &mut DataFormat,
        rules: &Rules<'_>,
        language: Language<'_>,
    ) -> Result<Vec<Fitted>, Problem> {
        if *format == DataFormat::Auto {
            *format = record::detect(line, rules.task)?;
        }
        check_task(*format, rules.task).map_err(|text| Problem { whole: true, ..Problem::from(text) })?;
        let (record, ignored) = record::parse(line, *format, rules)?;
        ignored.into_iter().for_each(|name| self.counts.ignore(name));
        let samples = encode::samples(record, rules, language, &mut self.counts)?;
        samples.iter().try_for_each(|sample| check_ids(sample, rules.vocab_size))?;
        // How long a sample may be is another policy's to say.
        let fitted = samples.into_iter().map(|sample| sample::fit(sample, rules.max_length, rules.overlong));
        let fitted: Result<Vec<Fitted>, String> = fitted.collect();
        fitted.map_err(|text| Problem { whole: true, ..Problem::from(text) })
    }

    /// Keeps the samples of a group, unless the policy has left one of them out, or the cut all that is different about them.
    fn keep_group(&mut self, group: Vec<Fitted>) -> Result<(), TrainError> {
        let ids = |fitted: &Fitted| match fitted {
            Fitted::Whole(sample) | Fitted::Cut(sample) => sample.ids.clone(),
            Fitted::Skipped | Fitted::Emptied => Vec::new(),
        };
        if group.contains(&Fitted::Skipped) {
            self.keep(Fitted::Skipped)
        } else if group.contains(&Fitted::Emptied) || group.windows(2).any(|pair| ids(&pair[0]) == ids(&pair[1])) {
            self.keep(Fitted::Emptied)
        } else {
            group.into_iter().try_for_each(|fitted| self.keep(fitted))
        }
    }

    /// Keeps a sample, unless the policy has left it out.
    fn keep(&mut self, fitted: Fitted) -> Result<(), TrainError> {
        let sample = match fitted {
            Fitted::Whole(sample) => sample,
            Fitted::Cut(sample) => {
                self.counts.truncated += 1;
                sample
            }
            Fitted::Skipped => {
                self.counts.skipped += 1;
                return Ok(());
            }
            Fitted::Emptied => {
                self.counts.emptied += 1;
                return Ok(());
            }
        };
        self.counts.samples += u64::from(!matches!(sample.target, Target::Part(1..) | Target::Answer(1.., _)));
        self.counts.tokens += sample.ids.len() as u64;
        self.counts.targets += sample.targets() as u64;
        self.counts.longest = self.counts.longest.max(sample.ids.len() as u64);
        self.counts.balance.count(&sample.target);
        self.samples.push(&sample)
    }
}

impl Counts {
    /// Leaves out the line that an error is about, where the policy has it so and it is that line's alone.
    fn refuse(&mut self, error: DataError, policy: OnError) -> Result<(), DataError> {
        if policy == OnError::Fail || !matches!(error, DataError::Line { whole: false, .. }) {
            return Err(error);
        }
        self.refused += 1;
        if self.refusals.len() < MAX_REFUSALS {
            self.refusals.push(error.to_string().chars().take(MAX_REFUSAL_CHARS).collect());
        }
        Ok(())
    }
}

/// Labels are for whole texts, and tasks of whole texts need labels.
pub fn check_task(format: DataFormat, task: Task) -> Result<(), String> {
    match (format, task) {
        (DataFormat::TextLabel, Task::CausalLM) => {
            Err("`text` and `label` are data of tasks Classification, MultiLabelClassification and Regression; the task is CausalLM"
                .to_owned())
        }
        (DataFormat::Preference, Task::CausalLM) => {
            Err("`chosen` and `rejected` are data of tasks Reward and DPO; the task is CausalLM".to_owned())
        }
        (DataFormat::Pair, Task::CausalLM) => Err("`anchor` and `positive` are data of task Embedding; the task is CausalLM".to_owned()),
        (DataFormat::Auto, _) | (_, Task::CausalLM) => Ok(()),
        (DataFormat::Preference, Task::Reward | Task::Dpo) | (DataFormat::Pair, Task::Embedding) => Ok(()),
        (_, Task::Embedding) => Err("task Embedding needs `anchor` and `positive`".to_owned()),
        (_, Task::Reward) => Err("task Reward needs `chosen` and `rejected`".to_owned()),
        (_, Task::Dpo) => Err("task DPO needs `prompt`, `chosen` and `rejected`".to_owned()),
        (DataFormat::TextLabel, _) => Ok(()),
        _ => Err(format!("task {task:?} needs `text` (or `messages`) and `label`")),
    }
}

fn check_ids(sample: &Sample, vocab_size: u32) -> Result<(), String> {
    match sample.ids.iter().position(|&id| id >= vocab_size) {
        Some(index) => Err(format!("token {index} is {}, the base's vocabulary has {vocab_size}", sample.ids[index])),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests;
