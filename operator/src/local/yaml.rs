//! YAML documents as values, and on which line each field stands, so that an error can say so.

use std::collections::BTreeMap;

use saphyr_parser::{Event, Parser, ScalarStyle, Tag};
use serde_json::{Map, Value};

use super::scalar;

/// Levels of a document: as many as serde_json reads.
const DEPTH: usize = 128;
/// Values that the aliases of a text may stand for in all: a text of a few lines could stand for more than fits into memory.
const ALIASED: usize = 100_000;

/// Lines of the fields of one document, by field path (`spec.pools[0].name`); the document itself is the empty path.
pub type Lines = BTreeMap<String, usize>;

/// One document: what it says, and where.
pub type Document = (Value, Lines);

/// Why a text cannot be read, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Number of the document, from 1.
    pub document: usize,
    /// Line in the text, from 1.
    pub line: usize,
    /// What is wrong.
    pub problem: String,
}

/// The documents of a text, JSON too. A field that is given twice is refused: which one counts is nothing that a reader can see.
pub fn documents(text: &str) -> Result<Vec<Document>, Fault> {
    let mut composer = Composer::default();
    for step in Parser::new_from_str(text.trim_start_matches('\u{FEFF}')) {
        let (line, outcome) = match step {
            Ok((event, span)) => (span.start.line(), composer.event(event, span.start.line())),
            Err(error) => (error.marker().line(), Err(error.info().to_owned())),
        };
        outcome.map_err(|problem| Fault { document: composer.documents.len().max(1), line, problem })?;
    }
    Ok(composer.documents)
}

/// The line of `field`, or of the nearest field around it.
pub fn line_of(lines: &Lines, field: &str) -> usize {
    let mut field = field;
    loop {
        if let Some(line) = lines.get(field) {
            return *line;
        }
        match field.rfind(['.', '[']) {
            Some(end) => field = &field[..end],
            None => return lines.get("").copied().unwrap_or(1),
        }
    }
}

/// A mapping or sequence that is being read, its path and its anchor.
struct Frame {
    path: String,
    anchor: usize,
    node: Node,
}

enum Node {
    Mapping { members: Map<String, Value>, merged: Vec<Value>, key: Option<Key> },
    Sequence(Vec<Value>),
}

enum Key {
    Name(String),
    /// `<<`: the members of the value, where the mapping has none of that name.
    Merge,
}

#[derive(Default)]
struct Composer {
    documents: Vec<Document>,
    frames: Vec<Frame>,
    anchors: BTreeMap<usize, Value>,
    aliased: usize,
}

impl Composer {
    fn event(&mut self, event: Event<'_>, line: usize) -> Result<(), String> {
        match event {
            Event::DocumentStart(_) => self.documents.push((Value::Null, Lines::from([(String::new(), line)]))),
            Event::Scalar(text, style, anchor, tag) => {
                let plain = style == ScalarStyle::Plain && tag.is_none();
                if self.awaits_key() {
                    return self.key(&text, plain, line);
                }
                self.enter(line);
                self.value(scalar(&text, plain, tag.as_deref())?, anchor)?;
            }
            Event::Alias(anchor) if self.awaits_key() => return Err(format!("alias {anchor} stands for a key")),
            Event::Alias(anchor) => {
                self.enter(line);
                let value = self.anchors.get(&anchor).cloned().ok_or("an alias stands within what it is an alias of")?;
                self.aliased += size(&value);
                if self.aliased > ALIASED {
                    return Err("its aliases stand for too much".to_owned());
                }
                self.value(value, 0)?;
            }
            Event::MappingStart(..) | Event::SequenceStart(..) if self.awaits_key() => {
                return Err("a key is a mapping or a list".to_owned());
            }
            Event::MappingStart(anchor, _) => {
                self.begin(Node::Mapping { members: Map::new(), merged: Vec::new(), key: None }, anchor, line)?
            }
            Event::SequenceStart(anchor, _) => self.begin(Node::Sequence(Vec::new()), anchor, line)?,
            Event::MappingEnd | Event::SequenceEnd => self.end()?,
            _ => {}
        }
        Ok(())
    }

    fn awaits_key(&self) -> bool {
        matches!(self.frames.last(), Some(Frame { node: Node::Mapping { key: None, .. }, .. }))
    }

    fn key(&mut self, text: &str, plain: bool, line: usize) -> Result<(), String> {
        let name = if plain { scalar::key(text)? } else { text.to_owned() };
        let Some(Frame { node: Node::Mapping { members, key, .. }, .. }) = self.frames.last_mut() else { return Ok(()) };
        if members.contains_key(&name) {
            return Err(format!("duplicate entry with key {name:?}"));
        }
        *key = Some(if plain && text == "<<" { Key::Merge } else { Key::Name(name) });
        self.note(line);
        Ok(())
    }

    fn begin(&mut self, node: Node, anchor: usize, line: usize) -> Result<(), String> {
        if self.frames.len() == DEPTH {
            return Err(format!("it is nested more than {DEPTH} levels deep"));
        }
        self.enter(line);
        self.frames.push(Frame { path: self.path(), anchor, node });
        Ok(())
    }

    fn end(&mut self) -> Result<(), String> {
        let Some(Frame { anchor, node, .. }) = self.frames.pop() else { return Ok(()) };
        let value = match node {
            Node::Sequence(items) => Value::Array(items),
            Node::Mapping { mut members, merged, .. } => {
                for (name, value) in merged.into_iter().map(mappings).collect::<Result<Vec<_>, _>>()?.into_iter().flatten().flatten() {
                    members.entry(name).or_insert(value);
                }
                Value::Object(members)
            }
        };
        self.value(value, anchor)
    }

    /// Puts a whole value where the reader stands.
    fn value(&mut self, value: Value, anchor: usize) -> Result<(), String> {
        if anchor > 0 {
            self.anchors.insert(anchor, value.clone());
        }
        match self.frames.last_mut().map(|frame| &mut frame.node) {
            Some(Node::Sequence(items)) => items.push(value),
            Some(Node::Mapping { members, merged, key }) => match key.take() {
                Some(Key::Merge) => merged.push(value),
                Some(Key::Name(name)) => drop(members.insert(name, value)),
                None => return Err("a value has no key".to_owned()),
            },
            None => {
                if let Some((document, _)) = self.documents.last_mut() {
                    *document = value;
                }
            }
        }
        Ok(())
    }

    /// Notes the line of an item; that of a member is its key's.
    fn enter(&mut self, line: usize) {
        if matches!(self.frames.last(), Some(Frame { node: Node::Sequence(_), .. })) {
            self.note(line);
        }
    }

    fn note(&mut self, line: usize) {
        let path = self.path();
        if let Some((_, lines)) = self.documents.last_mut() {
            lines.insert(path, line);
        }
    }

    /// Where the reader stands.
    fn path(&self) -> String {
        let Some(Frame { path, node, .. }) = self.frames.last() else { return String::new() };
        match node {
            Node::Sequence(items) => format!("{path}[{}]", items.len()),
            Node::Mapping { key: Some(Key::Name(key)), .. } if path.is_empty() => key.clone(),
            Node::Mapping { key: Some(Key::Name(key)), .. } if key.contains(['.', '/']) => format!("{path}[{key}]"),
            Node::Mapping { key: Some(Key::Name(key)), .. } => format!("{path}.{key}"),
            Node::Mapping { .. } => path.clone(),
        }
    }
}

fn scalar(text: &str, plain: bool, tag: Option<&Tag>) -> Result<Value, String> {
    match tag.filter(|tag| tag.is_yaml_core_schema()).map(|tag| tag.suffix.as_str()) {
        Some("int" | "float" | "bool" | "null") => scalar::resolve(text),
        None if plain => scalar::resolve(text),
        _ => Ok(Value::String(text.to_owned())),
    }
}

/// What is merged: a mapping, or a list of them, of which the first counts most.
fn mappings(value: Value) -> Result<Vec<Map<String, Value>>, String> {
    let one = |value| if let Value::Object(members) = value { Ok(members) } else { Err("<< takes a mapping or a list of them".to_owned()) };
    match value {
        Value::Array(items) => items.into_iter().map(one).collect(),
        value => one(value).map(|members| vec![members]),
    }
}

fn size(value: &Value) -> usize {
    1 + match value {
        Value::Array(items) => items.iter().map(size).sum(),
        Value::Object(members) => members.values().map(size).sum(),
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn fields_are_found_in_block_and_flow_style_over_documents() {
        let text = "# comment\na: 1\nb:\n  c: [1,\n    2]\n  d:\n  - e: x\n    f: {g: 1}\n---\nkind: X\n";
        let documents = documents(text).unwrap();
        let line = |path| line_of(&documents[0].1, path);
        assert_eq!(
            [line("a"), line("b.c"), line("b.c[1]"), line("b.d[0].e"), line("b.d[0].f.g"), line("b.d[0].missing")],
            [2, 4, 5, 7, 8, 7]
        );
        assert_eq!(line_of(&documents[1].1, "kind"), 10);
        assert_eq!(documents[0].0, json!({"a": 1, "b": {"c": [1, 2], "d": [{"e": "x", "f": {"g": 1}}]}}));
    }

    #[test]
    fn aliases_and_merges_are_what_they_stand_for() {
        let text = "a: &a {x: 1, z: 2}\nb: {<<: *a, z: 3}\nc: {<<: [{x: 4}, *a]}\nd: [*a]\n";
        let a = json!({"x": 1, "z": 2});
        assert_eq!(documents(text).unwrap()[0].0, json!({"a": a, "b": {"x": 1, "z": 3}, "c": {"x": 4, "z": 2}, "d": [a]}));
    }

    #[test]
    fn faults_have_a_document_and_a_line() {
        let fault = |text: &str| {
            let Fault { document, line, problem } = documents(text).unwrap_err();
            format!("{document}, {line}: {problem}")
        };
        assert_eq!(fault("a: 1\nb: 2\n---\na: 1\na: 2\n"), "2, 5: duplicate entry with key \"a\"");
        assert_eq!(fault("a: .nan\n"), "1, 1: .nan is no number that JSON has");
        assert_eq!(fault("a: {<<: 3}\n"), "1, 1: << takes a mapping or a list of them");
        assert_eq!(fault(&"[".repeat(200)), "1, 1: it is nested more than 128 levels deep");
        let bomb: String = (1..20).map(|level| format!("a{level}: &a{level} [{}]\n", format!("*a{}, ", level - 1).repeat(9))).collect();
        assert!(fault(&format!("a0: &a0 [x]\n{bomb}")).ends_with("its aliases stand for too much"));
        for text in ["a: *b\n", "a: b: c\n", "a: [\n", "? [a]\n: b\n", "~: a\n", "a: \"\n"] {
            assert!(documents(text).is_err(), "{text:?}");
        }
    }
}
