//! What is wrong with a line, and where in it.

use super::strict::TWICE;

/// What is wrong with one line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Character of the line, from 1, where one is to blame.
    pub column: Option<u64>,
    /// What is wrong; names the field.
    pub text: String,
    /// Whether it is not this line's alone: then nobody is asked whether the line may be left out.
    pub whole: bool,
}

impl From<String> for Problem {
    fn from(text: String) -> Self {
        Self { column: None, text, whole: false }
    }
}

/// What a list of samples is told.
pub const ARRAY: &str = "a JSON array, not JSON Lines: one object a line";
/// What a line between two carriage returns is told.
pub const CARRIAGE_RETURN: &str =
    "a carriage return inside the line: JSON Lines ends a line with a line feed, so convert the file's line ends";

impl From<&str> for Problem {
    fn from(text: &str) -> Self {
        Self::from(text.to_owned())
    }
}

impl Problem {
    /// A line that is no JSON: what it is, where people do not see it.
    pub fn not_json(line: &str, error: &serde_json::Error) -> Self {
        // The parser counts bytes, people characters.
        let before = line.char_indices().take_while(|(at, _)| at + 1 < error.column()).count();
        let reason = error.to_string();
        let reason = reason.rsplit_once(" at line ").map_or(reason.as_str(), |(reason, _)| reason);
        let text = if line.chars().nth(before) == Some('\u{FEFF}') {
            "a byte-order mark (U+FEFF) in the middle of the file, as where files were joined: take it out".to_owned()
        } else if line.contains('\0') {
            "a NUL byte, as where a file was not written to its end: take it out".to_owned()
        } else if line.contains('\r') {
            CARRIAGE_RETURN.to_owned()
        } else if reason.starts_with(TWICE) {
            reason.to_owned()
        } else if error.is_eof() {
            format!("not JSON: {reason}; JSON Lines has each object on one line")
        } else if reason == "trailing characters" {
            "something behind the object: JSON Lines has one object a line".to_owned()
        } else {
            format!("not JSON: {reason}")
        };
        Self { column: Some(before as u64 + 1), text, whole: false }
    }
}

#[cfg(test)]
mod tests {
    use super::super::strict::Strict;
    use super::*;

    #[test]
    fn says_what_people_do_not_see_and_where() {
        for (line, column, text) in [
            ("\u{FEFF}{\"text\":\"a\"}", 1, "a byte-order mark (U+FEFF) in the middle"),
            ("{\"text\":\"å\"}\u{FEFF}{\"text\":\"b\"}", 13, "a byte-order mark (U+FEFF) in the middle"),
            ("{\"text\":\"a\"}\r{\"text\":\"b\"}", 14, "a carriage return inside the line"),
            ("{", 1, "not JSON: EOF while parsing an object; JSON Lines has each object on one line"),
            ("{\"text\":\"a\"} {\"text\":\"b\"}", 14, "something behind the object: JSON Lines has one object a line"),
            ("{\"å\": nil}", 8, "not JSON: expected ident"),
            ("{\"text\":\"a\"}\0\0", 13, "a NUL byte"),
            ("{\"text\":\"a\0\"}", 11, "a NUL byte"),
            ("{\"text\":\"a\\ud800\"}", 17, "not JSON: unexpected end of hex escape"),
            ("{\"text\":\"a\\udc00b\"}", 16, "not JSON: lone leading surrogate in hex escape"),
            ("{\"text\":\"a\",\"text\":\"b\"}", 18, "the member `text` comes twice"),
            ("{'text': 1}", 2, "not JSON: key must be a string"),
        ] {
            let error = serde_json::from_str::<Strict>(line).map(|_| ()).unwrap_err();
            let problem = Problem::not_json(line, &error);
            assert!(problem.text.starts_with(text), "{line:?}: {}", problem.text);
            assert_eq!(problem.column, Some(column), "{line:?}: {}", problem.text);
        }
    }
}
