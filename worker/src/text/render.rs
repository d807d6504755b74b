//! What chat templates run in: Jinja with the filters and functions that transformers gives them.

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Value;
use minijinja::{Environment, Error, ErrorKind};
use serde::{Deserialize, Serialize};

use super::tojson::to_json;

/// A model's templates, as it ships them.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Templates {
    /// For conversations without tools, and with them where there is no other.
    pub(super) default: String,
    /// For conversations with tools.
    pub(super) tool_use: Option<String>,
}

/// Which of the templates.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Name {
    Default,
    ToolUse,
}

/// One rendering.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Job {
    pub(super) name: Name,
    /// What the template reads, by name.
    pub(super) variables: Value,
    /// Steps that it may take.
    pub(super) fuel: u64,
    /// Milliseconds of Unix time that `strftime_now` shows; `None`: now.
    pub(super) now: Option<i64>,
}

/// Why nothing was rendered.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Failure {
    /// What went wrong, or what the template says.
    pub(super) message: String,
    /// Whether the template calls something that is not there: it fails whatever it is given.
    pub(super) unknown: bool,
}

/// Compiled templates.
pub(super) struct Renderer {
    environment: Environment<'static>,
}

impl Name {
    fn as_str(self) -> &'static str {
        match self {
            Self::Default => "default",
            Self::ToolUse => "tool_use",
        }
    }
}

impl Renderer {
    /// Compiles `templates`; else says what is wrong with one.
    pub(super) fn new(templates: &Templates) -> Result<Self, String> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|error| error.to_string())?);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_filter("tojson", to_json);
        // As Python has it: nothing is no empty list.
        environment.add_test("iterable", |value: &Value| !value.is_none() && value.try_iter().is_ok());
        environment.add_function("raise_exception", |message: String| -> Result<Value, Error> { Err(refusal(message)) });
        let named = [(Name::Default, Some(&templates.default)), (Name::ToolUse, templates.tool_use.as_ref())];
        for (name, template) in named.into_iter().filter_map(|(name, template)| Some((name, template?))) {
            let added = environment.add_template_owned(name.as_str(), without_generation(template));
            added.map_err(|error| error.to_string())?;
        }
        Ok(Self { environment })
    }

    /// The text.
    pub(super) fn render(&self, job: &Job) -> Result<String, Failure> {
        let mut environment = self.environment.clone();
        environment.set_fuel(Some(job.fuel));
        let now = job.now.and_then(|now| jiff::Timestamp::from_millisecond(now).ok());
        environment.add_function("strftime_now", move |format: String| strftime(&format, now.unwrap_or_else(jiff::Timestamp::now)));
        let rendered = environment.get_template(job.name.as_str()).and_then(|template| template.render(&job.variables));
        rendered.map_err(|error| {
            let unknown = [ErrorKind::UnknownFilter, ErrorKind::UnknownTest, ErrorKind::UnknownFunction].contains(&error.kind());
            // What the template itself has to say is told without the place where it says it.
            Failure { message: error.detail().filter(|_| !unknown).map_or_else(|| error.to_string(), String::from), unknown }
        })
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

pub(super) fn refusal(message: impl Into<std::borrow::Cow<'static, str>>) -> Error {
    Error::new(ErrorKind::InvalidOperation, message)
}

fn strftime(format: &str, now: jiff::Timestamp) -> Result<String, Error> {
    let now = now.to_zoned_datetime(jiff::tz::TimeZone::system());
    jiff::fmt::strtime::format(format, &now).map_err(|error| refusal(format!("strftime_now: {error}")))
}
