//! On which line of a YAML text each field stands, so that an error can say so.

use std::collections::BTreeMap;

use saphyr_parser::{Event, Parser};

/// Lines of the fields of one document, by field path (`spec.pools[0].name`); the document itself is the empty path.
pub type Lines = BTreeMap<String, usize>;

enum Frame {
    Mapping { path: String, key: Option<String> },
    Sequence { path: String, index: usize },
}

/// The lines of each document of `text`; a text that cannot be parsed ends the list.
pub fn lines(text: &str) -> Vec<Lines> {
    let mut documents: Vec<Lines> = Vec::new();
    let mut frames: Vec<Frame> = Vec::new();
    for step in Parser::new_from_str(text) {
        let Ok((event, span)) = step else { break };
        let line = span.start.line();
        match event {
            Event::DocumentStart(_) => documents.push(Lines::from([(String::new(), line)])),
            Event::MappingEnd | Event::SequenceEnd => {
                frames.pop();
            }
            Event::Scalar(text, ..) => {
                if let Some(Frame::Mapping { key: key @ None, .. }) = frames.last_mut() {
                    *key = Some(text.into_owned());
                    let path = here(&frames);
                    enter(&mut documents, path, line);
                } else {
                    value(&mut frames, &mut documents, line);
                }
            }
            Event::Alias(_) => {
                value(&mut frames, &mut documents, line);
            }
            Event::MappingStart(..) => {
                let path = value(&mut frames, &mut documents, line);
                frames.push(Frame::Mapping { path, key: None });
            }
            Event::SequenceStart(..) => {
                let path = value(&mut frames, &mut documents, line);
                frames.push(Frame::Sequence { path, index: 0 });
            }
            _ => {}
        }
    }
    documents
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

/// Enters a value at the place where the parser stands and moves on; its path.
fn value(frames: &mut [Frame], documents: &mut [Lines], line: usize) -> String {
    let path = here(frames);
    match frames.last_mut() {
        Some(Frame::Sequence { index, .. }) => {
            *index += 1;
            enter(documents, path.clone(), line);
        }
        Some(Frame::Mapping { key, .. }) => *key = None,
        None => {}
    }
    path
}

fn here(frames: &[Frame]) -> String {
    match frames.last() {
        Some(Frame::Mapping { path, key: Some(key) }) if path.is_empty() => key.clone(),
        Some(Frame::Mapping { path, key: Some(key) }) if key.contains(['.', '/']) => format!("{path}[{key}]"),
        Some(Frame::Mapping { path, key: Some(key) }) => format!("{path}.{key}"),
        Some(Frame::Mapping { path, key: None }) => path.clone(),
        Some(Frame::Sequence { path, index }) => format!("{path}[{index}]"),
        None => String::new(),
    }
}

fn enter(documents: &mut [Lines], path: String, line: usize) {
    if let Some(document) = documents.last_mut() {
        document.insert(path, line);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_found_in_block_and_flow_style_over_documents() {
        let text = "# comment\na: 1\nb:\n  c: [1,\n    2]\n  d:\n  - e: x\n    f: {g: 1}\n---\nkind: X\n";
        let documents = lines(text);
        let line = |path| line_of(&documents[0], path);
        assert_eq!(
            [line("a"), line("b.c"), line("b.c[1]"), line("b.d[0].e"), line("b.d[0].f.g"), line("b.d[0].missing")],
            [2, 4, 5, 7, 8, 7]
        );
        assert_eq!(line_of(&documents[1], "kind"), 10);
    }
}
