//! Chat templates: Jinja rendered to the byte as transformers' `apply_chat_template` does.

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Value;
use minijinja::{Environment, Error, ErrorKind, context};

use super::TextError;
use super::message::{Conversation, Message};
use super::tojson::to_json;

/// A compiled chat template.
pub struct ChatTemplate {
    environment: Environment<'static>,
    bos_token: Option<String>,
    eos_token: Option<String>,
}

/// What a template may do: about as many steps, each of which may take 64 bytes. The publishers' need some hundreds for a turn.
const FUEL: u64 = 1_000_000;
/// And for each byte of the conversation, which templates copy a few times.
const FUEL_PER_BYTE: u64 = 2;

const DEFAULT: &str = "default";
const TOOL_USE: &str = "tool_use";

impl ChatTemplate {
    /// Compiles `template`; `bos` and `eos` are the tokens' texts, left undefined when absent.
    pub fn new(template: &str, bos: Option<&str>, eos: Option<&str>) -> Result<Self, TextError> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|error| TextError::Template(error.to_string()))?);
        environment.set_fuel(Some(FUEL));
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_filter("tojson", to_json);
        environment.add_function("raise_exception", |message: String| -> Result<Value, Error> { Err(refusal(message)) });
        environment.add_function("strftime_now", |format: String| strftime(&format, jiff::Timestamp::now()));
        Self { environment, bos_token: bos.map(String::from), eos_token: eos.map(String::from) }.with(DEFAULT, template)
    }

    /// Lets the template's clock stand at `now`, which is what `strftime_now` says from here on.
    pub fn stand_still(&mut self, now: jiff::Timestamp) {
        self.environment.add_function("strftime_now", move |format: String| strftime(&format, now));
    }

    /// This template, with another one for conversations with tools.
    pub fn with_tool_use(self, template: Option<&str>) -> Result<Self, TextError> {
        match template {
            Some(template) => self.with(TOOL_USE, template),
            None => Ok(self),
        }
    }

    fn with(mut self, name: &'static str, template: &str) -> Result<Self, TextError> {
        let unusable = |error: Error| TextError::Template(error.to_string());
        self.environment.add_template_owned(name, without_generation(template)).map_err(unusable)?;
        // What it calls is looked up when it runs: a name that nobody knows is found by running it. What it says of the messages is no matter.
        let trial = Conversation { messages: vec![Message::new("user", "")], ..Conversation::default() };
        let trial = self.environment.get_template(name).and_then(|found| found.render(self.variables(&trial, 1, true)));
        let unknown = [ErrorKind::UnknownFilter, ErrorKind::UnknownTest, ErrorKind::UnknownFunction];
        match trial {
            Err(error) if unknown.contains(&error.kind()) => Err(unusable(error)),
            _ => Ok(self),
        }
    }

    /// The prompt for the first `turns` messages; `add_generation_prompt` appends the beginning of the assistant's next turn.
    pub fn render(&self, conversation: &Conversation, turns: usize, add_generation_prompt: bool) -> Result<String, TextError> {
        let variables = self.variables(conversation, turns, add_generation_prompt);
        let mut environment = self.environment.clone();
        environment.set_fuel(Some(FUEL + FUEL_PER_BYTE * conversation.size()));
        let template = environment.get_template(self.name(&conversation.tools));
        let rendered = template.and_then(|template| template.render(variables));
        rendered.map_err(|error| TextError::Render(error.detail().map_or_else(|| error.to_string(), String::from)))
    }

    /// Whether the template that conversations without or with `tools` get looks at `member`.
    pub fn knows(&self, member: &str, tools: &[Value]) -> bool {
        let template = self.environment.get_template(self.name(tools));
        template.is_ok_and(|template| words(template.source()).any(|word| word == member))
    }

    /// Whether `character` stands in it.
    pub(super) fn holds(&self, character: char) -> bool {
        self.environment.templates().any(|(_, template)| template.source().contains(character))
    }

    fn name(&self, tools: &[Value]) -> &'static str {
        let for_tools = !tools.is_empty() && self.environment.get_template(TOOL_USE).is_ok();
        if for_tools { TOOL_USE } else { DEFAULT }
    }

    fn variables(&self, Conversation { messages, tools, options }: &Conversation, turns: usize, add_generation_prompt: bool) -> Value {
        let token = |token: &Option<String>| token.as_deref().map_or(Value::UNDEFINED, Value::from);
        let own = context! {
            messages => messages[..turns].iter().map(Message::to_value).collect::<Value>(),
            add_generation_prompt,
            tools => if tools.is_empty() { Value::from(()) } else { tools.iter().cloned().collect() },
            documents => (),
            bos_token => token(&self.bos_token),
            eos_token => token(&self.eos_token),
        };
        match options.is_empty() {
            true => own,
            false => context! { ..own, ..Value::from_pairs(options.iter().map(|(name, value)| (name.as_str(), value.clone()))) },
        }
    }
}

/// transformers marks what an assistant says by `{% generation %}`: a block whose body is rendered, in a scope of its own.
fn without_generation(template: &str) -> String {
    let mut parts = template.split("{%");
    let mut plain = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        plain.push_str("{%");
        let tag = part.split("%}").next().unwrap_or_default();
        let word = tag.trim_matches(|character: char| character.is_whitespace() || matches!(character, '-' | '+'));
        match word {
            "generation" | "endgeneration" => plain.push_str(&part.replacen("generation", "with", 1)),
            _ => plain.push_str(part),
        }
    }
    plain
}

/// The names in a template, and the words of its texts.
fn words(template: &str) -> impl Iterator<Item = &str> {
    template.split(|character: char| !character.is_alphanumeric() && character != '_')
}

pub(super) fn refusal(message: impl Into<std::borrow::Cow<'static, str>>) -> Error {
    Error::new(ErrorKind::InvalidOperation, message)
}

fn strftime(format: &str, now: jiff::Timestamp) -> Result<String, Error> {
    let now = now.to_zoned_datetime(jiff::tz::TimeZone::system());
    jiff::fmt::strtime::format(format, &now).map_err(|error| refusal(format!("strftime_now: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn render(template: &str) -> Result<String, TextError> {
        let messages = vec![Message::new("user", "é \"<&>\" "), Message::new("assistant", "b")];
        ChatTemplate::new(template, None, Some("</s>"))?.render(&Conversation { messages, ..Conversation::default() }, 2, true)
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
        let mut template = ChatTemplate::new("{{ strftime_now('%d %b %Y %s') }}", None, None).unwrap();
        template.stand_still(jiff::Timestamp::from_second(1_700_000_000).unwrap());
        assert_eq!(template.render(&Conversation::default(), 0, true).unwrap(), "14 Nov 2023 1700000000");
    }

    #[test]
    fn conversations_with_tools_get_the_template_that_is_for_them() {
        let template = |tool_use| ChatTemplate::new("plain", None, None).unwrap().with_tool_use(tool_use).unwrap();
        let tools = vec![Value::from_pairs([("name", "f"), ("z", "1"), ("a", "2")])];
        let (without, with) = (Conversation::default(), Conversation { tools: tools.clone(), ..Conversation::default() });
        let both = template(Some("{{ tools | tojson }}"));
        assert_eq!(both.render(&without, 0, true).unwrap(), "plain");
        assert_eq!(both.render(&with, 0, true).unwrap(), r#"[{"name": "f", "z": "1", "a": "2"}]"#);
        assert_eq!((both.knows("tools", &[]), both.knows("tools", &tools), both.knows("tool", &tools)), (false, true, false));
        assert_eq!(template(None).render(&with, 0, true).unwrap(), "plain");
    }

    #[test]
    fn a_template_can_neither_loop_nor_allocate_without_bound() {
        for template in [
            "{{ 'x' * 1000000000 }}",
            "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}",
            "{% set n = namespace(x='xxxxxxxx') %}{% for a in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
        ] {
            let started = std::time::Instant::now();
            assert!(render(template).is_err(), "{template}");
            assert!(started.elapsed().as_secs() < 5, "{template}");
        }
    }

    #[test]
    fn options_are_variables_of_the_template() {
        let template = ChatTemplate::new("{{ enable_thinking is defined and not enable_thinking }}{{ effort }}", None, None).unwrap();
        let options = vec![("enable_thinking".to_owned(), Value::from(false)), ("effort".to_owned(), Value::from("low"))];
        assert_eq!(template.render(&Conversation { options, ..Conversation::default() }, 0, true).unwrap(), "Truelow");
        assert_eq!(template.render(&Conversation::default(), 0, true).unwrap(), "False");
    }
}
