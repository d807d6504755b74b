//! Chat templates: Jinja rendered to the byte as transformers' `apply_chat_template` does.

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde, Value};
use minijinja::{Environment, Error, ErrorKind, context};
use serde::{Deserialize, Serialize};

use super::TextError;

/// One turn of a chat.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Message {
    /// `system`, `user`, `assistant`, or what else the template knows.
    pub role: String,
    /// The text.
    pub content: String,
}

/// A compiled chat template.
pub struct ChatTemplate {
    environment: Environment<'static>,
    bos_token: Option<String>,
    eos_token: Option<String>,
}

const NAME: &str = "chat_template";

impl ChatTemplate {
    /// Compiles `template`; `bos` and `eos` are the tokens' texts, left undefined when absent.
    pub fn new(template: &str, bos: Option<&str>, eos: Option<&str>) -> Result<Self, TextError> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|error| TextError::Template(error.to_string()))?);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_filter("tojson", to_json);
        environment.add_function("raise_exception", |message: String| -> Result<Value, Error> { Err(refusal(message)) });
        environment.add_function("strftime_now", strftime_now);
        environment.add_template_owned(NAME, template.to_owned()).map_err(|error| TextError::Template(error.to_string()))?;
        Ok(Self { environment, bos_token: bos.map(String::from), eos_token: eos.map(String::from) })
    }

    /// The prompt for `messages`; `add_generation_prompt` appends the beginning of the assistant's next turn.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String, TextError> {
        let token = |token: &Option<String>| token.as_deref().map_or(Value::UNDEFINED, Value::from);
        let variables = context! {
            messages => Serde(messages),
            add_generation_prompt,
            tools => (),
            documents => (),
            bos_token => token(&self.bos_token),
            eos_token => token(&self.eos_token),
        };
        let rendered = self.environment.get_template(NAME).and_then(|template| template.render(variables));
        rendered.map_err(|error| TextError::Render(error.detail().map_or_else(|| error.to_string(), String::from)))
    }
}

fn refusal(message: impl Into<std::borrow::Cow<'static, str>>) -> Error {
    Error::new(ErrorKind::InvalidOperation, message)
}

fn strftime_now(format: &str) -> Result<String, Error> {
    let now = jiff::ZonedDateTime::now();
    jiff::fmt::strtime::format(format, &now).map_err(|error| refusal(format!("strftime_now: {error}")))
}

/// Python's `json.dumps(value, ensure_ascii=False, indent=indent)`.
fn to_json(value: &Value, options: Kwargs) -> Result<Value, Error> {
    let indent: Option<usize> = options.get("indent")?;
    let _: Option<bool> = options.get("ensure_ascii")?;
    options.assert_all_used()?;
    let mut bytes = Vec::new();
    let written = match indent {
        None => value.serialize(&mut serde_json::Serializer::with_formatter(&mut bytes, OneLine)),
        Some(width) => {
            let blanks = vec![b' '; width.min(16)];
            let formatter = serde_json::ser::PrettyFormatter::with_indent(&blanks);
            value.serialize(&mut serde_json::Serializer::with_formatter(&mut bytes, formatter))
        }
    };
    written.map_err(|error| refusal(format!("tojson: {error}")))?;
    Ok(Value::from_safe_string(String::from_utf8_lossy(&bytes).into_owned()))
}

/// Python's separators: `, ` and `: `.
struct OneLine;

impl serde_json::ser::Formatter for OneLine {
    fn begin_array_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        writer.write_all(if first { b"" } else { b", " })
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        self.begin_array_value(writer, first)
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        writer.write_all(b": ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn render(template: &str) -> Result<String, TextError> {
        let messages =
            [("user", "é \"<&>\" "), ("assistant", "b")].map(|(role, content)| Message { role: role.into(), content: content.into() });
        ChatTemplate::new(template, None, Some("</s>"))?.render(&messages, true)
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
            ("{{ [none, true, 1.5, {}] | tojson }}{{ none }}{{ add_generation_prompt }}", "[null, true, 1.5, {}]NoneTrue"),
        ] {
            assert_eq!(render(template).unwrap(), expected, "{template}");
        }
    }

    #[test]
    fn says_why_a_template_refuses() {
        let refused = render("{{ raise_exception('roles must alternate') }}").unwrap_err().to_string();
        assert_eq!(refused, "the chat template refused the messages: roles must alternate");
        assert!(render("{% if %}").unwrap_err().to_string().starts_with("unusable chat template"));
        assert_eq!(render("{{ strftime_now('%Y') }}").unwrap().len(), 4);
    }
}
