//! Chat templates: Jinja rendered to the byte as transformers' `apply_chat_template` does.

use minijinja::context;
use minijinja::value::Value;

use super::TextError;
use super::apart::Apart;
use super::message::{Conversation, Message, REASONING};
use super::render::{Failure, Job, Name, Renderer, Templates};

/// A compiled chat template.
pub struct ChatTemplate {
    templates: Templates,
    /// Renders them here, for want of a process to do so.
    here: Renderer,
    apart: Option<Apart>,
    bos_token: Option<String>,
    eos_token: Option<String>,
    now: Option<i64>,
}

/// What a template may do: about as many steps, each of which may take 64 bytes. The publishers' need some hundreds for a turn.
const FUEL: u64 = 1_000_000;
/// And for each byte of the conversation, which templates copy a few times.
const FUEL_PER_BYTE: u64 = 2;

impl ChatTemplate {
    /// Compiles `template`, and the one for conversations with tools where there is another; `bos` and `eos` are the tokens' texts, left
    /// undefined when absent.
    pub fn new(template: &str, tool_use: Option<&str>, bos: Option<&str>, eos: Option<&str>) -> Result<Self, TextError> {
        let templates = Templates { default: template.to_owned(), tool_use: tool_use.map(String::from) };
        let here = Renderer::new(&templates).map_err(TextError::Template)?;
        let (apart, bos_token, eos_token) = (Apart::new(&templates), bos.map(String::from), eos.map(String::from));
        let compiled = Self { templates, here, apart, bos_token, eos_token, now: None };
        // What it calls is looked up when it runs: a name that nobody knows is found by running it. What it says of the messages is no matter.
        let trial = Conversation { messages: vec![Message::new("user", "")], ..Conversation::default() };
        for name in [Some(Name::Default), tool_use.map(|_| Name::ToolUse)].into_iter().flatten() {
            if let Err(Failure { message, unknown: true }) = compiled.run(name, &trial, 1, true) {
                return Err(TextError::Template(message));
            }
        }
        Ok(compiled)
    }

    /// Lets the template's clock stand at `now`, which is what `strftime_now` says from here on.
    pub fn stand_still(&mut self, now: jiff::Timestamp) {
        self.now = Some(now.as_millisecond());
    }

    /// The prompt for the first `turns` messages; `add_generation_prompt` appends the beginning of the assistant's next turn.
    pub fn render(&self, conversation: &Conversation, turns: usize, add_generation_prompt: bool) -> Result<String, TextError> {
        let rendered = self.run(self.name(&conversation.tools), conversation, turns, add_generation_prompt);
        rendered.map_err(|failure| TextError::Render(failure.message))
    }

    fn run(&self, name: Name, conversation: &Conversation, turns: usize, add_generation_prompt: bool) -> Result<String, Failure> {
        let variables = self.variables(conversation, turns, add_generation_prompt);
        let job = Job { name, variables, fuel: FUEL + FUEL_PER_BYTE * conversation.size(), now: self.now };
        match &self.apart {
            Some(apart) => apart.render(&job),
            None => self.here.render(&job),
        }
    }

    /// Whether the template that conversations without or with `tools` get looks at `member`.
    pub fn knows(&self, member: &str, tools: &[Value]) -> bool {
        let source = match (self.name(tools), &self.templates.tool_use) {
            (Name::ToolUse, Some(template)) => template,
            _ => &self.templates.default,
        };
        // Whatever name it came by, templates find it by two.
        let thought = REASONING.contains(&member);
        words(source).any(|word| word == member || (thought && REASONING[..2].contains(&word)))
    }

    /// Whether `character` stands in it.
    pub(super) fn holds(&self, character: char) -> bool {
        let Templates { default, tool_use } = &self.templates;
        default.contains(character) || tool_use.as_ref().is_some_and(|template| template.contains(character))
    }

    fn name(&self, tools: &[Value]) -> Name {
        if !tools.is_empty() && self.templates.tool_use.is_some() { Name::ToolUse } else { Name::Default }
    }

    fn variables(&self, Conversation { messages, tools, options }: &Conversation, turns: usize, add_generation_prompt: bool) -> Value {
        let own = context! {
            messages => messages[..turns].iter().map(Message::to_value).collect::<Value>(),
            add_generation_prompt,
            tools => if tools.is_empty() { Value::from(()) } else { tools.iter().cloned().collect() },
            documents => (),
        };
        let tokens = [("bos_token", &self.bos_token), ("eos_token", &self.eos_token)];
        let tokens = tokens.into_iter().filter_map(|(name, token)| Some((name, Value::from(token.as_deref()?))));
        let options = options.iter().map(|(name, value)| (name.as_str(), value.clone()));
        context! { ..own, ..Value::from_pairs(tokens.chain(options)) }
    }
}

/// The names in a template, and the words of its texts.
fn words(template: &str) -> impl Iterator<Item = &str> {
    template.split(|character: char| !character.is_alphanumeric() && character != '_')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn render(template: &str) -> Result<String, TextError> {
        let messages = vec![Message::new("user", "é \"<&>\" "), Message::new("assistant", "b")];
        ChatTemplate::new(template, None, None, Some("</s>"))?.render(&Conversation { messages, ..Conversation::default() }, 2, true)
    }

    // Expected texts: transformers 5.23 with jinja2 3.1.6, `_compile_jinja_template(template).render(messages=…, add_generation_prompt=True, eos_token="</s>", tools=None, documents=None)`.
    #[test]
    fn renders_as_transformers_does() {
        for (template, expected) in [
            (
                "{% for m in messages %}\n  {% if loop.first %}\n{{ m.role + ':' }}\n{% endif %}{{ m['content'] | trim }}\n{% endfor %}\n",
                "user:\né \"<&>\"\nb\n",
            ),
            ("{{ messages | tojson }}", r#"[{"role": "user", "content": "é \"<&>\" "}, {"role": "assistant", "content": "b"}]"#),
            ("{{ messages[1] | tojson(indent=2) }}", "{\n  \"role\": \"assistant\",\n  \"content\": \"b\"\n}"),
            ("{{ bos_token }}{{ eos_token }}{{ tools is none }}{% if tools is defined and tools %}x{% endif %}", "</s>True"),
            ("{{ messages[0].content.strip().upper() }}{{ messages[-1].content.startswith('b') }}", "É \"<&>\"True"),
            (
                "{% set ns = namespace(n=0) %}{% for m in messages[::-1] %}{% if loop.last %}{% break %}{% endif %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
                "1",
            ),
            (
                "{% for m in messages %}{% if m.role == 'assistant' %}\n  {%- generation -%}\n {{ m.content }}\n{%- endgeneration +%}\n{% else %}{{ m.role }}{% endif %}{% endfor %}|",
                "userb\n|",
            ),
            ("{% set x = 'a' %}{%generation%}{% set x = 'b' %}{{ x }}{% endgeneration %}{{ x }}", "ba"),
            ("{{ {'b': 1, 'a': ['é', {}]} | tojson(separators=(',', ':')) }}", r#"{"b":1,"a":["é",{}]}"#),
            ("{{ {'b': 1, 'a': [2, {'d': 1.5, 'c': none}]} | tojson(sort_keys=True) }}", r#"{"a": [2, {"c": null, "d": 1.5}], "b": 1}"#),
            (
                "{{ messages[0].content | tojson(ensure_ascii=True) }}{{ '🦐' | tojson(ensure_ascii=True) }}",
                r#""\u00e9 \"<&>\" ""\ud83e\udd90""#,
            ),
            (
                "{{ {'a': [1, {'b': []}], 'c': {}} | tojson(indent=2) }}",
                "{\n  \"a\": [\n    1,\n    {\n      \"b\": []\n    }\n  ],\n  \"c\": {}\n}",
            ),
            ("{{ [1, [2]] | tojson(indent=1, separators=(';', '=')) }}", "[\n 1;\n [\n  2\n ]\n]"),
            ("{{ [] | tojson(indent=2) }}{{ {} | tojson(indent=2) }}{{ [[]] | tojson(indent=1) }}", "[]{}[\n []\n]"),
            (
                "{{ [1e16, 1.5e-5, 0.0001, 9007199254740993.0, -0.0, 1e100, 2.0] | tojson }}",
                "[1e+16, 1.5e-05, 0.0001, 9007199254740992.0, -0.0, 1e+100, 2.0]",
            ),
            ("{{ [none, true, 1.5, {}] | tojson }}{{ none }}{{ add_generation_prompt }}", "[null, true, 1.5, {}]NoneTrue"),
        ] {
            assert_eq!(render(template).unwrap(), expected, "{template}");
        }
    }

    #[test]
    fn says_why_a_template_refuses() {
        let refused = render("{{ raise_exception('roles must alternate') }}").unwrap_err().to_string();
        assert_eq!(refused, "the chat template refused the messages: roles must alternate");
        for bad in
            ["{% if %}", "{% unknown %}", "{{ messages | nofilter }}", "{% if messages is notest %}{% endif %}", "{{ nofunction() }}"]
        {
            assert!(render(bad).unwrap_err().to_string().starts_with("unusable chat template"), "{bad}");
        }
        assert_eq!(render("{{ strftime_now('%Y') }}").unwrap().len(), 4);
    }

    #[test]
    fn a_clock_can_stand_still() {
        let mut template = ChatTemplate::new("{{ strftime_now('%d %b %Y %s') }}", None, None, None).unwrap();
        template.stand_still(jiff::Timestamp::from_second(1_700_000_000).unwrap());
        assert_eq!(template.render(&Conversation::default(), 0, true).unwrap(), "14 Nov 2023 1700000000");
    }

    #[test]
    fn conversations_with_tools_get_the_template_that_is_for_them() {
        let template = |tool_use| ChatTemplate::new("plain", tool_use, None, None).unwrap();
        let tools = vec![Value::from_pairs([("name", "f"), ("z", "1"), ("a", "2")])];
        let (without, with) = (Conversation::default(), Conversation { tools: tools.clone(), ..Conversation::default() });
        let both = template(Some("{{ tools | tojson }}"));
        assert_eq!(both.render(&without, 0, true).unwrap(), "plain");
        assert_eq!(both.render(&with, 0, true).unwrap(), r#"[{"name": "f", "z": "1", "a": "2"}]"#);
        assert_eq!((both.knows("tools", &[]), both.knows("tools", &tools), both.knows("tool", &tools)), (false, true, false));
        assert_eq!(template(None).render(&with, 0, true).unwrap(), "plain");
    }

    #[test]
    fn options_are_variables_of_the_template() {
        let template = ChatTemplate::new("{{ enable_thinking is defined and not enable_thinking }}{{ effort }}", None, None, None).unwrap();
        let options = vec![("enable_thinking".to_owned(), Value::from(false)), ("effort".to_owned(), Value::from("low"))];
        assert_eq!(template.render(&Conversation { options, ..Conversation::default() }, 0, true).unwrap(), "Truelow");
        assert_eq!(template.render(&Conversation::default(), 0, true).unwrap(), "False");
    }
}
