//! The filter `tojson`, as transformers has it: Python's `json.dumps`.

use minijinja::value::{Kwargs, Value};
use minijinja::{Error, State};
use serde::Serialize;

use super::render::refusal;

/// What a unit of minijinja's fuel pays for.
const BYTES_PER_FUEL: u64 = 64;

/// Python's `json.dumps(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False)`.
pub(super) fn to_json(state: &State<'_, '_>, value: &Value, options: Kwargs) -> Result<Value, Error> {
    let failed = |error: serde_json::Error| refusal(format!("tojson: {error}"));
    let indent: Option<usize> = options.get("indent")?;
    let separators: Option<(String, String)> =
        options.get::<Option<Vec<String>>>("separators")?.and_then(|pair| pair.try_into().ok().map(|[item, key]: [String; 2]| (item, key)));
    let sorted = options.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    let ascii = options.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false);
    options.assert_all_used()?;
    let (item, key) = separators.unwrap_or_else(|| (if indent.is_some() { "," } else { ", " }.to_owned(), ": ".to_owned()));
    let room = state.fuel_levels().map_or(u64::MAX, |(_, left)| left.saturating_mul(BYTES_PER_FUEL));
    let layout = Python { indent, item, key, depth: 0, empty: true };
    let mut bytes = write(value, layout.clone(), room).map_err(failed)?;
    if sorted {
        // serde_json keeps the members of its objects sorted.
        let value = serde_json::from_slice::<serde_json::Value>(&write(value, compact(), room).map_err(failed)?).map_err(failed)?;
        bytes = write(&value, layout, room).map_err(failed)?;
    }
    let text = String::from_utf8_lossy(&bytes).into_owned();
    Ok(Value::from_safe_string(if ascii { escaped(&text) } else { text }))
}

/// JSON with every character beyond ASCII in its escaped form.
fn escaped(json: &str) -> String {
    let escape = |character: char| match character.is_ascii() {
        true => character.to_string(),
        false => character.encode_utf16(&mut [0; 2]).iter().map(|unit| format!("\\u{unit:04x}")).collect(),
    };
    json.chars().map(escape).collect()
}

/// JSON of `value` in at most `room` bytes: lists that hold a list twice may be small and print to any length.
fn write(value: &impl Serialize, layout: Python, room: u64) -> serde_json::Result<Vec<u8>> {
    let mut output = Output { bytes: Vec::new(), room };
    value.serialize(&mut serde_json::Serializer::with_formatter(&mut output, layout))?;
    Ok(output.bytes)
}

struct Output {
    bytes: Vec<u8>,
    room: u64,
}

impl std::io::Write for Output {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let left = self.room.checked_sub(bytes.len() as u64);
        self.room = left.ok_or_else(|| std::io::Error::other("more than a template may make"))?;
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn compact() -> Python {
    Python { indent: None, item: ",".to_owned(), key: ":".to_owned(), depth: 0, empty: true }
}

/// Python's lay-out.
#[derive(Clone)]
struct Python {
    indent: Option<usize>,
    item: String,
    key: String,
    depth: usize,
    /// Whether the list or object that was begun last has nothing in it yet.
    empty: bool,
}

impl Python {
    fn begin(&mut self, writer: &mut (impl std::io::Write + ?Sized), bracket: &str) -> std::io::Result<()> {
        (self.depth, self.empty) = (self.depth + 1, true);
        writer.write_all(bracket.as_bytes())
    }

    fn next(&mut self, writer: &mut (impl std::io::Write + ?Sized), first: bool) -> std::io::Result<()> {
        self.empty = false;
        writer.write_all(if first { "" } else { &self.item }.as_bytes())?;
        self.line(writer)
    }

    fn end(&mut self, writer: &mut (impl std::io::Write + ?Sized), bracket: &str) -> std::io::Result<()> {
        self.depth -= 1;
        if !std::mem::take(&mut self.empty) {
            self.line(writer)?;
        }
        writer.write_all(bracket.as_bytes())
    }

    fn line(&self, writer: &mut (impl std::io::Write + ?Sized)) -> std::io::Result<()> {
        self.indent.map_or(Ok(()), |width| write!(writer, "\n{}", " ".repeat(width.min(16) * self.depth)))
    }
}

impl serde_json::ser::Formatter for Python {
    fn write_f64<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, value: f64) -> std::io::Result<()> {
        let shortest = format!("{value:e}");
        match shortest.split_once('e').and_then(|(digits, exponent)| Some((digits, exponent.parse::<i32>().ok()?))) {
            Some((digits, exponent)) if !(-4..16).contains(&exponent) => write!(writer, "{digits}e{exponent:+03}"),
            _ => write!(writer, "{value:?}"),
        }
    }

    fn begin_array<W: ?Sized + std::io::Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        self.begin(writer, "[")
    }

    fn begin_array_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        self.next(writer, first)
    }

    fn end_array<W: ?Sized + std::io::Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        self.end(writer, "]")
    }

    fn begin_object<W: ?Sized + std::io::Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        self.begin(writer, "{")
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        self.next(writer, first)
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        writer.write_all(self.key.as_bytes())
    }

    fn end_object<W: ?Sized + std::io::Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        self.end(writer, "}")
    }
}
