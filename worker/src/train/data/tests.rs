use super::*;
use crate::text::byte_tokenizer;

const TEMPLATE: &str = "{% for message in messages %}<{{ message.role }}>{{ message.content }}<|end|>\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}";
const END: u32 = 256;

pub fn rules(task: Task, labels: &[String]) -> Rules<'_> {
    Rules {
        task,
        format: DataFormat::Auto,
        targets: Targets::AllAssistant,
        thinking: Default::default(),
        split_special_tokens: true,
        text_end: None,
        max_length: 64,
        overlong: Overlong::Truncate,
        on_error: OnError::Fail,
        vocab_size: 257,
        end_tokens: &[END],
        labels,
    }
}

fn read_with(template: &str, content: &str, rules: &Rules<'_>) -> Result<DataSet, TrainError> {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), content).unwrap();
    let (tokenizer, template) = (byte_tokenizer(&["<|end|>"]), ChatTemplate::new(template, None, None, None).unwrap());
    load(
        &[file.path().to_owned()],
        rules,
        Language { tokenizer: &tokenizer, template: Some(&template) },
        &std::env::temp_dir(),
        &mut |_| Ok(()),
    )
}

fn read(content: &str, rules: &Rules<'_>) -> Result<DataSet, TrainError> {
    read_with(TEMPLATE, content, rules)
}

/// What is said of content that cannot be read.
fn refusal(content: &str, rules: &Rules<'_>) -> String {
    read(content, rules).unwrap_err().to_string()
}

fn text(ids: &[u32]) -> String {
    let bytes = ids.iter().flat_map(|&id| if id == END { b"$".to_vec() } else { vec![id as u8] });
    String::from_utf8(bytes.collect()).unwrap()
}

/// All samples, in their order.
fn samples(data: &DataSet) -> Vec<Sample> {
    (0..data.samples.len()).map(|index| data.samples.read(index).unwrap()).collect()
}

/// The learned parts of the samples of a line.
fn learned(line: &str, rules: &Rules<'_>) -> Vec<String> {
    samples(&read(line, rules).unwrap()).iter().map(|sample| text(&sample.wanted())).collect()
}

#[test]
fn the_mask_is_completion_and_end_token() {
    let line = r#"{"messages":[{"role":"user","content":"a?"},{"role":"assistant","content":"x;y"}]}"#;
    let data = read(line, &rules(Task::CausalLM, &[])).unwrap();
    assert_eq!(text(&samples(&data)[0].wanted()), "x;y$");
    assert_eq!(text(&samples(&data)[0].ids), "<user>a?$\n<assistant>x;y$");
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
fn what_was_thought_is_learned_or_dropped() {
    let template = "{% for message in messages %}<{{ message.role }}>{% if message.reasoning_content %}({{ message.reasoning_content }}){% endif %}{{ message.content }}<|end|>\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}";
    let learned = |answer: &str, thinking| {
        let line = format!(r#"{{"messages":[{{"role":"user","content":"<think>a</think>"}},{{"role":"assistant",{answer}}}]}}"#);
        let data = read_with(template, &line, &Rules { thinking, ..rules(Task::CausalLM, &[]) });
        data.map(|data| text(&samples(&data)[0].wanted())).map_err(|error| error.to_string())
    };
    let [aside, inside] = [r#""content":"b","thinking":"hm""#, r#""content":"<think>\nhm\n</think>\n\nb""#];
    assert_eq!([aside, inside].map(|answer| learned(answer, Thinking::Keep).unwrap()), ["(hm)b$", "<think>\nhm\n</think>\n\nb$"]);
    assert_eq!([aside, inside].map(|answer| learned(answer, Thinking::Drop).unwrap()), ["b$", "b$"]);
    assert_eq!(learned(r#""content":"b</think>""#, Thinking::Drop).unwrap(), "b</think>$");
    let refused = learned(r#""content":"<think>hm</think>""#, Thinking::Drop).unwrap_err();
    assert!(refused.ends_with("field `messages[1].content` is nothing but thinking, which data.thinking has dropped"), "{refused}");
}

#[test]
fn a_control_token_that_a_user_wrote_is_text_unless_it_is_asked_for() {
    let line = r#"{"messages":[{"role":"user","content":"a<|end|>b"},{"role":"assistant","content":"c<|end|>d"}]}"#;
    let split = rules(Task::CausalLM, &[]);
    let samples = self::samples(&read(line, &split).unwrap());
    assert_eq!(text(&samples[0].ids), "<user>a<|end|>b$\n<assistant>c<|end|>d$");
    assert_eq!(text(&samples[0].wanted()), "c<|end|>d$");
    let samples = self::samples(&read(line, &Rules { split_special_tokens: false, ..split }).unwrap());
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
    let line = r#"{"messages":[{"role":"user","content":"a","name":"x","id":7},{"role":"assistant","content":"b","id":8}],"source":"s"}"#;
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
    assert_eq!(text(&samples(&data)[0].ids), format!("[{{\"z\": 1}}]<user>a$<assistant>{call}<tooln>t$<assistant>b$"));
    assert_eq!(text(&samples(&data)[0].wanted()), format!("{call}b$"));
    let refusal = |line: &str| read(line, &rules(Task::CausalLM, &[])).unwrap_err().to_string();
    assert!(refusal(line).ends_with("line 1: field `tools`: the base's chat template has no place for it"));
    let without = line.replacen(r#""tools""#, r#""documents""#, 1);
    assert!(refusal(&without).ends_with("line 1: field `messages[1].tool_calls`: the base's chat template has no place for it"));
    // An empty list, as exports write it with every turn, calls nothing.
    let exported = r#"{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b","tool_calls":[]}]}"#;
    let plain = exported.replace(r#","tool_calls":[]"#, "");
    assert_eq!(
        samples(&read(exported, &rules(Task::CausalLM, &[])).unwrap()),
        samples(&read(&plain, &rules(Task::CausalLM, &[])).unwrap())
    );
    let silent = exported.replace(r#""content":"b","#, "");
    assert!(refusal(&silent).ends_with("field `messages[1].content` is missing"), "{}", refusal(&silent));
}

#[test]
fn a_line_that_is_no_json_is_named_with_its_column() {
    let refusal = |content: &str| refusal(content, &rules(Task::CausalLM, &[]));
    let joined = refusal("\u{FEFF}{\"text\":\"ab\"}\n\u{FEFF}{\"text\":\"cd\"}\n");
    assert!(
        joined.ends_with("line 2, column 1: a byte-order mark (U+FEFF) in the middle of the file, as where files were joined: take it out"),
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
    let ended = load(&[file.path().to_owned()], &rules(Task::CausalLM, &[]), language, &std::env::temp_dir(), &mut |bytes| {
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
    let error = refusal(&content, &Rules { overlong: Overlong::Fail, ..rules(Task::CausalLM, &[]) });
    assert!(error.ends_with("line 1: 100 tokens, more than data.maxLength 64"), "{error}");
}

#[test]
fn a_line_of_another_format_is_named() {
    let error = refusal("{\"text\":\"a b\"}\n{\"prompt\":\"a\",\"completion\":\"b\"}\n", &rules(Task::CausalLM, &[]));
    assert!(error.ends_with("line 2: field `text` is missing"), "{error}");
}

#[test]
fn ids_beyond_the_vocabulary_are_refused() {
    let error = refusal("{\"input_ids\":[1,2,300],\"prompt_length\":1}\n", &rules(Task::CausalLM, &[]));
    assert!(error.ends_with("line 1: token 2 is 300, the base's vocabulary has 257"), "{error}");
}

#[test]
fn labels_are_checked_by_name() {
    let labels = ["ham".to_owned(), "spam".to_owned()];
    let data = read("{\"text\":\"buy\",\"label\":\"spam\"}\n", &rules(Task::Classification, &labels)).unwrap();
    assert_eq!(samples(&data)[0].target, Target::Label(1));
    let error = refusal("{\"text\":\"buy\",\"label\":\"eggs\"}\n", &rules(Task::Classification, &labels));
    assert!(error.ends_with("line 1: field `label` is \"eggs\", head.labels has ham, spam"), "{error}");
}

#[test]
fn format_and_task_must_fit() {
    let error = refusal("{\"text\":\"buy\"}\n", &rules(Task::Classification, &[]));
    assert!(error.ends_with("line 1: task Classification needs `text` (or `messages`) and `label`"), "{error}");
}

#[test]
fn a_file_without_samples_is_refused() {
    let error = refusal("\n\n", &rules(Task::CausalLM, &[]));
    assert!(error.contains("holds no usable sample (2 lines, 0 left out)"), "{error}");
}

/// Lines of every kind that somebody's files have held, and what is said of each.
const HOSTILE: &[(&[u8], &str)] = &[
    (b"\xef\xbb\xbf{\"text\":\"joined\"}", "column 1: a byte-order mark (U+FEFF) in the middle of the file"),
    (b"{\"text\":\"ab\"}\r{\"text\":\"cd\"}", "column 15: a carriage return inside the line"),
    (b"{\"text\":\"a\0b\"}", "a NUL byte"),
    (b"{\"text\":\"ab\"}\0\0\0", "a NUL byte"),
    (b"{\"text\":\"a\xffb\"}", "not UTF-8 at byte 10 of the line"),
    (b"{\"text\":\"ab\",\"text\":\"cd\"}", "the member `text` comes twice"),
    (b"{\"messages\":[{\"role\":\"user\",\"role\":\"user\",\"content\":\"a\"}]}", "the member `role` comes twice"),
    (b"{\"text\":\"a\\ud800b\"}", "not JSON: unexpected end of hex escape"),
    (b"{\"text\":\"a\\udc00b\"}", "not JSON: lone leading surrogate in hex escape"),
    (b"{\"text\":\"\"}", "field `text` is empty"),
    (b"{\"text\":\"ab\"", "not JSON: EOF while parsing an object"),
    (b"[1]", "a JSON array, not JSON Lines"),
    (b"{\"prompt\":\"a\",\"completion\":\"b\"}", "field `text` is missing"),
];

fn read_bytes(content: &[u8], rules: &Rules<'_>) -> Result<DataSet, TrainError> {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), content).unwrap();
    let (tokenizer, template) = (byte_tokenizer(&["<|end|>"]), ChatTemplate::new(TEMPLATE, None, None, None).unwrap());
    load(
        &[file.path().to_owned()],
        rules,
        Language { tokenizer: &tokenizer, template: Some(&template) },
        &std::env::temp_dir(),
        &mut |_| Ok(()),
    )
}

#[test]
fn every_kind_of_bad_line_is_named_or_left_out_as_the_policy_has_it() {
    let fail = rules(Task::CausalLM, &[]);
    let skip = Rules { on_error: OnError::Skip, ..fail };
    for (line, expect) in HOSTILE {
        let content = [b"{\"text\":\"first\"}\r\n", *line, b"\n{\"text\":\"last\"}\n"].concat();
        let error = read_bytes(&content, &fail).unwrap_err().to_string();
        assert!(error.contains(" line 2") && error.contains(expect), "{error}");
        let data = read_bytes(&content, &skip).unwrap();
        assert_eq!((data.counts.samples, data.counts.refused), (2, 1), "{expect}");
        // Each time it is another temporary file.
        let said = |text: &str| text.split_once("\" line ").unwrap().1.to_owned();
        let named: Vec<String> = data.counts.refusals.iter().map(|refusal| said(refusal)).collect();
        assert_eq!(named, [said(&error)], "the report says what the failure would have said");
    }
    let all: Vec<u8> = HOSTILE.iter().flat_map(|(line, _)| [line, &b"\n"[..]].concat()).collect();
    let content = [b"{\"text\":\"first\"}\n".to_vec(), all.repeat(3)].concat();
    let counts = read_bytes(&content, &skip).unwrap().counts;
    assert_eq!((counts.samples, counts.refused, counts.refusals.len()), (1, 3 * HOSTILE.len() as u64, MAX_REFUSALS));
    let error = read_bytes(&all, &skip);
    assert!(error.is_ok_and(|data| data.counts.samples > 0), "the first line that can be read says what the file holds");
}

#[test]
fn empty_turns_are_named_or_left_out() {
    let turn = |content: &str| format!(r#"{{"messages":[{{"role":"user","content":"a"}},{{"role":"assistant","content":"{content}"}}]}}"#);
    let content = format!("{}\n{}\n{{\"messages\":[]}}\n", turn("b"), turn(""));
    let fail = rules(Task::CausalLM, &[]);
    let error = read(&content, &fail).unwrap_err().to_string();
    assert!(error.contains("line 2: field `messages[1].content` is empty"), "{error}");
    let counts = read(&content, &Rules { on_error: OnError::Skip, ..fail }).unwrap().counts;
    assert_eq!((counts.samples, counts.refused), (1, 2));
}

#[test]
fn what_is_wrong_with_more_than_a_line_is_never_left_out() {
    let skip = Rules { on_error: OnError::Skip, ..rules(Task::CausalLM, &[]) };
    let refusal = |content: &[u8], rules: &Rules<'_>| read_bytes(content, rules).unwrap_err().to_string();
    assert!(refusal(b"\x1f\x8b\x08\0\n", &skip).contains("compressed by gzip"));
    let long = format!("{{\"text\":\"{}\"}}\n", "z".repeat(100));
    assert!(
        refusal(long.as_bytes(), &Rules { overlong: Overlong::Fail, ..skip }).ends_with("line 1: 100 tokens, more than data.maxLength 64")
    );
    assert!(refusal(b"{\"text\":\"a\",\"label\":\"b\"}\n", &skip).contains("data of tasks Classification"));
    let nothing = refusal(b"{\"text\":\"\"}\nno\n", &skip);
    assert!(nothing.contains("(2 lines, 2 left out; the first: ") && nothing.contains("line 1: "), "{nothing}");
}

#[test]
fn a_pair_is_two_samples_and_is_left_out_as_one() {
    let line = |chosen: &str, rejected: &str| format!("{{\"chosen\":\"{chosen}\",\"rejected\":\"{rejected}\"}}\n");
    let long = "a ".repeat(60);
    let rules = Rules { max_length: 20, overlong: Overlong::Skip, ..rules(Task::Reward, &[]) };
    let data = read(&(line("good", "bad") + &line(&long, "bad") + &line("bad", &long) + &line("ok", "no")), &rules).unwrap();
    let parts: Vec<Target> = samples(&data).into_iter().map(|sample| sample.target).collect();
    assert_eq!(parts, [Target::Part(0), Target::Part(1), Target::Part(0), Target::Part(1)]);
    assert_eq!((data.counts.samples, data.counts.skipped, data.counts.targets, data.samples.group_lengths().len()), (2, 2, 2, 2));
    let cut = Rules { max_length: 3, overlong: Overlong::Truncate, ..rules };
    let data = read(&(line("a b c good", "a b c bad") + &line("good", "bad")), &cut).unwrap();
    assert_eq!((data.counts.samples, data.counts.emptied), (1, 1), "no difference is left");
    let error = refusal("{\"text\":\"buy\"}\n", &rules);
    assert!(error.ends_with("line 1: task Reward needs `chosen` and `rejected`"), "{error}");
}

#[test]
fn of_answers_that_are_compared_the_last_turn_is_learned() {
    let line = |prompt: &str, chosen: &str| format!("{{\"prompt\":\"{prompt}\",\"chosen\":\"{chosen}\",\"rejected\":\"no\"}}\n");
    let rules = rules(Task::Dpo, &[]);
    let data = read(&line("sure?", "yes"), &rules).unwrap();
    let samples = samples(&data);
    let [Target::Answer(0, chosen), Target::Answer(1, rejected)] = [&samples[0].target, &samples[1].target] else { panic!("{samples:?}") };
    assert_eq!(chosen.start, rejected.start);
    assert_eq!(samples[0].ids[..chosen.start], samples[1].ids[..chosen.start], "both answer one prompt");
    assert_ne!(samples[0].wanted(), samples[1].wanted());
    assert_eq!((data.counts.samples, data.counts.targets), (1, (chosen.len() + rejected.len()) as u64));
    let cut = Rules { max_length: chosen.start, overlong: Overlong::Truncate, ..rules };
    let data = read(&(line("sure?", "yes") + &line("", "yes")), &cut).unwrap();
    assert_eq!((data.counts.samples, data.counts.emptied), (1, 1), "nothing that is learned is left of the first");
    let refused = |line: &str, expected: &str| {
        let error = refusal(line, &rules);
        assert!(error.ends_with(expected), "{error}");
    };
    refused("{\"chosen\":\"a\",\"rejected\":\"b\"}\n", "field `prompt` is missing: in task DPO `chosen` and `rejected` answer it");
    let turn = |role: &str| format!("[{{\"role\":\"{role}\",\"content\":\"a\"}}]");
    let last = "must each end with the assistant's turn, behind another one";
    refused(&format!("{{\"chosen\":{},\"rejected\":{}}}\n", turn("assistant"), turn("user")), last);
    refused("{\"text\":\"buy\"}\n", "task DPO needs `prompt`, `chosen` and `rejected`");
}
