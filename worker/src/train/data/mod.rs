//! Data sets: JSON Lines to token samples, with every refusal naming file and line.

mod encode;
mod files;
mod lines;
mod problem;
mod record;
mod sample;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use carryon_crds::job::{DataFormat, Overlong, Targets, Task};
use serde::{Deserialize, Serialize};

pub use files::Files;
pub use lines::{MAX_FILE_BYTES, MAX_LINE_BYTES};
pub use sample::{Sample, Target};

use crate::text::{ChatTemplate, Tokenizer};
use crate::train::error::{DataError, TrainError};
use lines::Lines;
use problem::Problem;
use sample::Fitted;

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
    /// Whether control tokens in the contents of a chat are text like any other.
    pub split_special_tokens: bool,
    /// What is put behind a plain text, if anything.
    pub text_end: Option<u32>,
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

/// What was read.
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
    /// Members of lines and turns that nobody reads, and how often they came.
    #[serde(default)]
    pub ignored: BTreeMap<String, u64>,
}

/// The samples of a split.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DataSet {
    /// In the order of the lines; shared with those who train on them.
    pub samples: Arc<Vec<Sample>>,
    /// What was read.
    pub counts: Counts,
}

impl DataSet {
    /// Tokens of each sample.
    pub fn lengths(&self) -> Vec<usize> {
        self.samples.iter().map(|sample| sample.ids.len()).collect()
    }
}

/// Reads `paths`, one after the other; `progress` is told the number of bytes now and then, and ends it by an error.
pub fn load(
    paths: &[PathBuf],
    rules: &Rules<'_>,
    language: Language<'_>,
    progress: &mut dyn FnMut(u64) -> Result<(), TrainError>,
) -> Result<DataSet, TrainError> {
    let mut data = DataSet::default();
    let (mut count, mut before) = (0, 0);
    for path in paths {
        let mut lines = Lines::open(path)?;
        let mut format = rules.format;
        while let Some(line) = lines.next_line()? {
            let read = data.read(line, &mut format, rules, language);
            read.map_err(|problem| lines.error(problem))?;
            if lines.number() % 64 == 0 {
                progress(before + lines.bytes())?;
            }
        }
        count += lines.number() - 1;
        before += lines.bytes();
    }
    match data.samples.is_empty() {
        true => Err(DataError::Empty { paths: paths.to_owned(), lines: count, skipped: data.counts.skipped + data.counts.emptied }.into()),
        false => Ok(data),
    }
}

impl DataSet {
    /// One line. A file's first decides on the format of all, where the rules do not.
    fn read(&mut self, line: &str, format: &mut DataFormat, rules: &Rules<'_>, language: Language<'_>) -> Result<(), Problem> {
        if *format == DataFormat::Auto {
            *format = record::detect(line)?;
        }
        check_task(*format, rules.task)?;
        let (record, ignored) = record::parse(line, *format, rules.targets)?;
        ignored.into_iter().for_each(|name| self.counts.ignore(name));
        for sample in encode::samples(record, rules, language, &mut self.counts)? {
            check_ids(&sample, rules.vocab_size)?;
            match sample::fit(sample, rules.max_length, rules.overlong)? {
                Fitted::Whole(sample) => self.push(sample),
                Fitted::Cut(sample) => {
                    self.counts.truncated += 1;
                    self.push(sample);
                }
                Fitted::Skipped => self.counts.skipped += 1,
                Fitted::Emptied => self.counts.emptied += 1,
            }
        }
        Ok(())
    }

    fn push(&mut self, sample: Sample) {
        self.counts.samples += 1;
        self.counts.tokens += sample.ids.len() as u64;
        self.counts.targets += sample.targets() as u64;
        self.counts.longest = self.counts.longest.max(sample.ids.len() as u64);
        Arc::make_mut(&mut self.samples).push(sample);
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

fn check_ids(sample: &Sample, vocab_size: u32) -> Result<(), String> {
    match sample.ids.iter().position(|&id| id >= vocab_size) {
        Some(index) => Err(format!("token {index} is {}, the base's vocabulary has {vocab_size}", sample.ids[index])),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::byte_tokenizer;

    const TEMPLATE: &str = "{% for message in messages %}<{{ message.role }}>{{ message.content }}<|end|>\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}";
    const END: u32 = 256;

    fn rules(task: Task, labels: &[String]) -> Rules<'_> {
        Rules {
            task,
            format: DataFormat::Auto,
            targets: Targets::AllAssistant,
            split_special_tokens: true,
            text_end: None,
            max_length: 64,
            overlong: Overlong::Truncate,
            vocab_size: 257,
            end_tokens: &[END],
            labels,
        }
    }

    fn read_with(template: &str, content: &str, rules: &Rules<'_>) -> Result<DataSet, TrainError> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), content).unwrap();
        let (tokenizer, template) = (byte_tokenizer(&["<|end|>"]), ChatTemplate::new(template, None, None, None).unwrap());
        load(&[file.path().to_owned()], rules, Language { tokenizer: &tokenizer, template: Some(&template) }, &mut |_| Ok(()))
    }

    fn read(content: &str, rules: &Rules<'_>) -> Result<DataSet, TrainError> {
        read_with(TEMPLATE, content, rules)
    }

    fn text(ids: &[u32]) -> String {
        let bytes = ids.iter().flat_map(|&id| if id == END { b"$".to_vec() } else { vec![id as u8] });
        String::from_utf8(bytes.collect()).unwrap()
    }

    /// The learned parts of the samples of a line.
    fn learned(line: &str, rules: &Rules<'_>) -> Vec<String> {
        read(line, rules).unwrap().samples.iter().map(|sample| text(&sample.wanted())).collect()
    }

    #[test]
    fn the_mask_is_completion_and_end_token() {
        let line = r#"{"messages":[{"role":"user","content":"a?"},{"role":"assistant","content":"x;y"}]}"#;
        let data = read(line, &rules(Task::CausalLM, &[])).unwrap();
        assert_eq!(text(&data.samples[0].wanted()), "x;y$");
        assert_eq!(text(&data.samples[0].ids), "<user>a?$\n<assistant>x;y$");
    }

    #[test]
    fn all_turns_of_the_assistant_are_learned_in_one_sample() {
        let line = r#"{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b"},{"role":"user","content":"c"},{"role":"assistant","content":"d"}]}"#;
        let all = rules(Task::CausalLM, &[]);
        assert_eq!(learned(line, &all), ["b$d$"]);
        assert_eq!(learned(line, &Rules { targets: Targets::LastAssistant, ..all }), ["d$"]);
        assert_eq!(read(line, &all).unwrap().counts.targets, 4);
    }

    #[test]
    fn a_control_token_that_a_user_wrote_is_text_unless_it_is_asked_for() {
        let line = r#"{"messages":[{"role":"user","content":"a<|end|>b"},{"role":"assistant","content":"c<|end|>d"}]}"#;
        let split = rules(Task::CausalLM, &[]);
        let samples = read(line, &split).unwrap().samples;
        assert_eq!(text(&samples[0].ids), "<user>a<|end|>b$\n<assistant>c<|end|>d$");
        assert_eq!(text(&samples[0].wanted()), "c<|end|>d$");
        let samples = read(line, &Rules { split_special_tokens: false, ..split }).unwrap().samples;
        assert_eq!(text(&samples[0].ids), "<user>a$b$\n<assistant>c$", "an answer ends at its first end token");
    }

    #[test]
    fn a_plain_text_has_an_end_token_where_one_is_asked_for() {
        let plain = rules(Task::CausalLM, &[]);
        let ended = Rules { text_end: Some(END), ..plain };
        assert_eq!(learned(r#"{"text":"abc"}"#, &plain), ["bc"]);
        assert_eq!(learned(r#"{"text":"abc"}"#, &ended), ["bc$"]);
        assert_eq!(learned(r#"{"text":"abc<|end|>"}"#, &ended), ["bc$"], "one is enough");
        assert_eq!(learned(r#"{"text":"abc"}"#, &Rules { max_length: 3, ..ended }), ["bc"], "what is cut off has no end");
    }

    #[test]
    fn what_nobody_reads_is_counted_by_name() {
        let line =
            r#"{"messages":[{"role":"user","content":"a","name":"x","id":7},{"role":"assistant","content":"b","id":8}],"source":"s"}"#;
        let counts = read(&format!("{line}\n{line}\n"), &rules(Task::CausalLM, &[])).unwrap().counts;
        let ignored: Vec<(&str, u64)> = counts.ignored.iter().map(|(name, count)| (name.as_str(), *count)).collect();
        assert_eq!(ignored, [("messages[].id", 4), ("messages[].name", 2), ("source", 2)]);
        let many: String = (0..40).map(|index| format!("{{\"text\":\"ab\",\"member{index}\":1}}\n")).collect();
        let counts = read(&many, &rules(Task::CausalLM, &[])).unwrap().counts;
        assert_eq!((counts.ignored.len(), counts.ignored["others"]), (encode::MAX_IGNORED + 1, 24));
    }

    #[test]
    fn tools_go_to_a_template_that_knows_them_and_are_refused_by_one_that_does_not() {
        let line = r#"{"tools":[{"z":1,"a":null}],"messages":[{"role":"user","content":"a"},{"role":"assistant","tool_calls":[{"function":{"name":"f","arguments":"{}"}}]},{"role":"tool","content":"t","name":"n"},{"role":"assistant","content":"b"}]}"#;
        let knows = "{{ tools | tojson }}{% for m in messages %}<{{ m.role }}{{ m.name }}>{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}<|end|>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}";
        let data = read_with(knows, line, &Rules { max_length: 200, ..rules(Task::CausalLM, &[]) }).unwrap();
        let call = r#"[{"function": {"name": "f", "arguments": {}}}]$"#;
        assert_eq!(text(&data.samples[0].ids), format!("[{{\"z\": 1}}]<user>a$<assistant>{call}<tooln>t$<assistant>b$"));
        assert_eq!(text(&data.samples[0].wanted()), format!("{call}b$"));
        let refusal = |line: &str| read(line, &rules(Task::CausalLM, &[])).unwrap_err().to_string();
        assert!(refusal(line).ends_with("line 1: field `tools`: the base's chat template has no place for it"));
        let without = line.replacen(r#""tools""#, r#""documents""#, 1);
        assert!(refusal(&without).ends_with("line 1: field `messages[1].tool_calls`: the base's chat template has no place for it"));
        // An empty list, as exports write it with every turn, calls nothing.
        let exported = r#"{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b","tool_calls":[]}]}"#;
        let plain = exported.replace(r#","tool_calls":[]"#, "");
        assert_eq!(
            read(exported, &rules(Task::CausalLM, &[])).unwrap().samples,
            read(&plain, &rules(Task::CausalLM, &[])).unwrap().samples
        );
        let silent = exported.replace(r#""content":"b","#, "");
        assert!(refusal(&silent).ends_with("field `messages[1].content` is missing"), "{}", refusal(&silent));
    }

    #[test]
    fn a_line_that_is_no_json_is_named_with_its_column() {
        let refusal = |content: &str| read(content, &rules(Task::CausalLM, &[])).unwrap_err().to_string();
        let joined = refusal("\u{FEFF}{\"text\":\"ab\"}\n\u{FEFF}{\"text\":\"cd\"}\n");
        assert!(
            joined.ends_with(
                "line 2, column 1: a byte-order mark (U+FEFF) in the middle of the file, as where files were joined: take it out"
            ),
            "{joined}"
        );
        assert!(refusal("[\n{\"text\":\"ab\"}\n]\n").ends_with("line 1: a JSON array, not JSON Lines: one object a line"));
        assert!(refusal("{\"text\":\"ab\"}\r{\"text\":\"cd\"}\r").contains("line 1, column 15: a carriage return inside the line"));
        assert!(refusal("{\"text\":\"ab\"}\n  {\"text\" 3}\n").ends_with("line 2, column 11: not JSON: expected `:`"));
    }

    #[test]
    fn reading_ends_when_someone_asks_to_stop() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "{\"text\":\"short\"}\n".repeat(100)).unwrap();
        let (tokenizer, mut told) = (byte_tokenizer(&[]), 0);
        let language = Language { tokenizer: &tokenizer, template: None };
        let ended = load(&[file.path().to_owned()], &rules(Task::CausalLM, &[]), language, &mut |bytes| {
            told = bytes;
            Err(TrainError::Stopped { step: 0 })
        });
        assert!(matches!(ended, Err(TrainError::Stopped { .. })) && told == 64 * 17, "{told}");
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
        assert!(error.ends_with("line 1: token 2 is 300, the base's vocabulary has 257"), "{error}");
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
