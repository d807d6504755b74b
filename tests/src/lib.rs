//! What the end-to-end tests share: where things are. `make test` sets the variables; the defaults are the places it uses.

pub mod cluster;
pub mod operator;

use std::path::{Path, PathBuf};

/// Root of the repository. Tests run in their package's folder; a path fixed at compile time would be that of whichever checkout built first.
pub fn repository() -> PathBuf {
    Path::new("..").canonicalize().expect("the package lies in the repository")
}

pub(crate) fn place(variable: &str, default: &str) -> PathBuf {
    let cache = || PathBuf::from(std::env::var_os("HOME").unwrap_or_default()).join(".cache/carry-on").join(default);
    std::env::var_os(variable).map_or_else(cache, PathBuf::from)
}

fn existing(variable: &str, path: PathBuf) -> PathBuf {
    assert!(path.exists(), "{} is missing: run `make test`, which provides it, or set {variable}", path.display());
    path
}

/// Text of `examples/NAME`.
///
/// # Panics
/// When there is no such file.
pub fn example(name: &str) -> String {
    let path = repository().join("examples").join(name);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// A release binary of ours.
///
/// # Panics
/// When it is not built.
pub fn binary(name: &str) -> PathBuf {
    existing("CARRYON_BIN", place("CARRYON_BIN", "target/release").join(name))
}

/// Folder of the release before this one: its `source`, and its programs in `release`.
///
/// # Panics
/// When it is not built.
pub fn previous() -> PathBuf {
    let folder = std::env::var_os("CARRYON_PREVIOUS").expect("CARRYON_PREVIOUS names the release before: run `make test-all`");
    existing("CARRYON_PREVIOUS", folder.into())
}

/// The SmolLM2 GGUF file.
///
/// # Panics
/// When it is not downloaded.
pub fn model() -> PathBuf {
    existing("CARRYON_MODEL", place("CARRYON_MODEL", "models/SmolLM2-135M-Instruct.Q4_1.gguf"))
}

/// A file of the quick start's data.
///
/// # Panics
/// When it is not made.
pub fn quickstart_data(file: &str) -> PathBuf {
    existing("CARRYON_DATA", place("CARRYON_DATA", "data").join("quickstart").join(file))
}

/// A folder whose node_modules hold the official `openai` client of JavaScript and the AI SDK.
///
/// # Panics
/// When they are not installed.
pub fn node() -> PathBuf {
    existing("CARRYON_NODE", place("CARRYON_NODE", "node").join("node_modules"));
    place("CARRYON_NODE", "node")
}

/// A Python with the official `openai` client.
///
/// # Panics
/// When it is not installed.
pub fn python() -> PathBuf {
    existing("CARRYON_PYTHON", place("CARRYON_PYTHON", "venvs/client/bin/python"))
}
