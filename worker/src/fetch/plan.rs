//! Which of a source's files are fetched: pure. Names come from outside, and are looked at before they become paths.

use std::collections::BTreeSet;

use glob::{MatchOptions, Pattern};
use serde::{Deserialize, Serialize};

use super::error::FetchError;
use super::folder::{PART, RECORD, RESERVED};
use crate::model::gguf;

/// Files a source may list.
pub const MAX_FILES: usize = 20_000;
/// Bytes of a name: what file systems take.
const MAX_NAME: usize = 1024;
const MAX_COMPONENT: usize = 200;

/// What a model needs beside its weights. Our decoder reads some of it; the rest is for the tools of who finds the folder.
const BESIDE: &[&str] = &[
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "*.jinja",
    "chat_template.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "vocab.json",
    "vocab.txt",
];

/// The file that says which shards make the weights.
pub const INDEX: &str = "model.safetensors.index.json";

/// A file at its source.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RemoteFile {
    /// Path inside the model's folder, with `/`.
    pub name: String,
    /// Bytes.
    pub size: u64,
    /// Changes whenever the content does.
    pub etag: Option<String>,
    /// Hexadecimal digest, where the source knows it.
    pub sha256: Option<String>,
}

/// Chooses among the names that `source` lists: those that `patterns` match, or what a model needs where there are none.
///
/// # Errors
/// A pattern that is none or matches nothing; no weights that we can read; a name that is no plain relative path.
pub fn choose(source: &str, names: &[String], patterns: &[String]) -> Result<Vec<String>, FetchError> {
    let mut chosen = if patterns.is_empty() { needed(source, names)? } else { matching(source, names, patterns)? };
    chosen.extend(others(source, names, &chosen)?);
    chosen.iter().try_for_each(|name| check_name(name))?;
    Ok(chosen.into_iter().collect())
}

fn matching(source: &str, names: &[String], patterns: &[String]) -> Result<BTreeSet<String>, FetchError> {
    let mut chosen = BTreeSet::new();
    for pattern in patterns {
        let found = filter(names, pattern).map_err(|error| FetchError::Configuration(format!("--files {pattern:?}: {error}")))?;
        if found.is_empty() {
            return Err(FetchError::Configuration(format!("--files {pattern:?} matches none of the {} files of {source}", names.len())));
        }
        chosen.extend(found);
    }
    Ok(chosen)
}

/// The files that are one with a GGUF file that is chosen.
fn others(source: &str, names: &[String], chosen: &BTreeSet<String>) -> Result<BTreeSet<String>, FetchError> {
    let parts: BTreeSet<String> = chosen.iter().filter_map(|name| gguf::parts(name)).flatten().collect();
    match parts.iter().find(|part| !names.contains(part)) {
        Some(missing) => Err(FetchError::Missing(format!("{source} lacks {missing}, without which the others of its set are no model"))),
        None => Ok(parts),
    }
}

/// The names of a file, and of those that it is one with.
pub fn together(name: &str) -> Vec<String> {
    gguf::parts(name).unwrap_or_else(|| vec![name.to_owned()])
}

/// Whether a file is one by itself, or the first of those that it is one with.
pub fn is_first(name: &str) -> bool {
    together(name)[0] == name
}

fn needed(source: &str, names: &[String]) -> Result<BTreeSet<String>, FetchError> {
    let find = |pattern: &str| filter(names, pattern).expect("the patterns above are patterns");
    let mut chosen: BTreeSet<String> = BESIDE.iter().flat_map(|pattern| find(pattern)).collect();
    // Some repositories hold the weights twice, under another name; the ones that the index names begin so.
    let mut weights = find("model*.safetensors");
    if weights.is_empty() {
        weights = find("*.safetensors");
    }
    if weights.is_empty() {
        weights = find("*.gguf");
        // Files that are one count as one.
        let models: BTreeSet<String> = weights.iter().map(|name| together(name).remove(0)).collect();
        if models.len() > 1 {
            let list = weights.join(", ");
            return Err(FetchError::Configuration(format!("{source} holds several GGUF files: say by --files which one: {list}")));
        }
    } else {
        chosen.extend(find(INDEX));
    }
    if weights.is_empty() {
        let why =
            "holds neither *.safetensors nor *.gguf, and other weights cannot be read; weights under other names are fetched by --files";
        return Err(FetchError::Configuration(format!("{source} {why}")));
    }
    chosen.extend(weights);
    Ok(chosen)
}

fn filter(names: &[String], pattern: &str) -> Result<Vec<String>, glob::PatternError> {
    let pattern = Pattern::new(pattern)?;
    let options = MatchOptions { require_literal_separator: true, ..MatchOptions::default() };
    Ok(names.iter().filter(|name| pattern.matches_with(name, options)).cloned().collect())
}

/// Whether `name` is a plain relative path, and none of those that a fetch uses for itself.
///
/// # Errors
/// It is not.
pub fn check_name(name: &str) -> Result<(), FetchError> {
    let plain = |component: &str| !matches!(component, "" | "." | "..") && component.len() <= MAX_COMPONENT;
    let odd = name.contains('\\') || name.chars().any(char::is_control) || name.len() > MAX_NAME;
    let ours = name.split('/').any(|component| component.starts_with(RESERVED)) || name.ends_with(PART) || name.ends_with(RECORD);
    if odd || ours || !name.split('/').all(plain) {
        return Err(FetchError::Refused(format!("the source has a file named {name:?}, which is no name for a file of a model's folder")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(names: &[&str], patterns: &[&str], expected: Result<&[&str], &str>) {
        let owned = |list: &[&str]| list.iter().map(|&name| name.to_owned()).collect::<Vec<_>>();
        match (choose("m", &owned(names), &owned(patterns)), expected) {
            (Ok(chosen), Ok(expected)) => assert_eq!(chosen, expected),
            (Err(error), Err(words)) => assert!(error.to_string().contains(words), "{error}"),
            (result, expected) => panic!("{result:?} instead of {expected:?}"),
        }
    }

    #[test]
    fn what_a_model_needs_is_chosen() {
        check(
            &[".gitattributes", "README.md", "config.json", "model.safetensors", "pytorch_model.bin", "onnx/model.onnx", "tokenizer.json"],
            &[],
            Ok(&["config.json", "model.safetensors", "tokenizer.json"]),
        );
        check(
            &[
                "consolidated.safetensors",
                "model-1-of-2.safetensors",
                "model-2-of-2.safetensors",
                INDEX,
                "original/a.safetensors",
                "x.gguf",
            ],
            &[],
            Ok(&["model-1-of-2.safetensors", "model-2-of-2.safetensors", INDEX]),
        );
        check(&["README.md", "x.gguf"], &[], Ok(&["x.gguf"]));
        check(&["a.gguf", "b.gguf"], &[], Err("a.gguf, b.gguf"));
        check(&["pytorch_model.bin"], &[], Err("neither"));
    }

    #[test]
    fn gguf_files_that_are_one_are_chosen_together() {
        let names = ["a-Q4-00001-of-00002.gguf", "a-Q4-00002-of-00002.gguf", "a-Q8.gguf", "b-00002-of-00002.gguf"];
        check(&names[..2], &[], Ok(&names[..2]));
        check(&names[..3], &[], Err("several GGUF files"));
        check(&names, &["*Q4*.gguf"], Ok(&names[..2]));
        check(&names, &["a-Q4-00001-of-00002.gguf"], Ok(&names[..2]));
        check(&names[3..], &[], Err("m lacks b-00001-of-00002.gguf"));
    }

    #[test]
    fn patterns_choose_instead() {
        let names = ["a-Q4.gguf", "a-Q8.gguf", "sub/b-Q4.gguf", "config.json"];
        check(&names, &["*Q4.gguf"], Ok(&["a-Q4.gguf"]));
        check(&names, &["**/*Q4.gguf", "config.json"], Ok(&["a-Q4.gguf", "config.json", "sub/b-Q4.gguf"]));
        check(&names, &["*Q5.gguf"], Err("matches none of the 4 files"));
        check(&names, &["a[.gguf"], Err("--files"));
    }

    #[test]
    fn names_that_lead_elsewhere_are_refused() {
        for name in
            ["../x.gguf", "/x.gguf", "a/../x.gguf", "a//x.gguf", "a\\x.gguf", "./x.gguf", "x\n.gguf", ".fetch.gguf", "x.gguf.part", ""]
        {
            assert!(check_name(name).is_err(), "{name:?}");
        }
        check_name("sub/model-00001-of-00002.safetensors").unwrap();
        check(&["../x.gguf"], &[], Err("neither"));
        check(&["../x.gguf"], &["**/*.gguf"], Err("no name"));
    }
}
