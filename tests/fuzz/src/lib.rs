//! What reads files of strangers, each as a function of bytes that may do anything but panic, hang, or take memory without bound.

mod bounded;

use std::path::{Path, PathBuf};
use std::sync::Once;

use carryon_worker::base;
use carryon_worker::model::gguf::Gguf;
use carryon_worker::model::{self, Files};
use carryon_worker::text::{ChatTemplate, Conversation, Message, Tokenizer, render_apart};

pub use bounded::Bounded;

/// A reader.
#[derive(Clone, Copy)]
pub struct Target {
    /// Its folder in `corpus/`.
    pub name: &'static str,
    read: fn(&Folder, &[u8]),
    /// MiB that it may take for the smallest file.
    fixed: usize,
}

/// Bytes that each byte of a file may take.
const PER_BYTE: usize = 128;

/// Every reader. What a tokenizer may take is the table of its ids and its expressions, each as large as the library for them allows.
pub const TARGETS: [Target; 7] = [
    Target { name: "gguf", read: gguf, fixed: 16 },
    Target { name: "safetensors", read: safetensors, fixed: 16 },
    Target { name: "index", read: index, fixed: 16 },
    Target { name: "config", read: config, fixed: 16 },
    Target { name: "vocabulary", read: vocabulary, fixed: 256 },
    Target { name: "tokenizer", read: tokenizer, fixed: 256 },
    Target { name: "template", read: template, fixed: 256 },
];

impl Target {
    /// Reads `bytes` as a file of its kind, in bounded memory where the global allocator is [`Bounded`].
    pub fn run(&self, folder: &Folder, bytes: &[u8]) {
        Bounded::within((self.fixed << 20) + PER_BYTE * bytes.len(), || (self.read)(folder, bytes));
    }
}

const CONFIG: &[u8] = include_bytes!("../corpus/config/llama.json");

/// Where readers of files find them: in memory where there is such a place.
pub struct Folder(tempfile::TempDir);

impl Folder {
    /// With the files beside which the fuzzed ones stand.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn new() -> std::io::Result<Self> {
        let memory = Path::new("/dev/shm");
        let folder = Self(if memory.is_dir() { tempfile::tempdir_in(memory)? } else { tempfile::tempdir()? });
        for (name, bytes) in [
            ("safetensors/config.json", CONFIG.to_vec()),
            ("index/config.json", CONFIG.to_vec()),
            ("index/a.safetensors", tensors("a")),
            ("index/b.safetensors", tensors("b")),
        ] {
            folder.put(name, &bytes)?;
        }
        Ok(folder)
    }

    fn put(&self, name: &str, bytes: &[u8]) -> std::io::Result<PathBuf> {
        let path = self.0.path().join(name);
        path.parent().map_or(Ok(()), std::fs::create_dir_all)?;
        std::fs::write(&path, bytes)?;
        Ok(path)
    }

    /// The folder with `bytes` in its file `name`.
    fn with(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.put(name, bytes).expect("room for a small file");
        path.parent().map(Path::to_owned).unwrap_or_default()
    }
}

/// A file with one tensor of one number.
fn tensors(name: &str) -> Vec<u8> {
    let header = format!(r#"{{"{name}":{{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}}}"#);
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &[0; 4]].concat()
}

fn gguf(folder: &Folder, bytes: &[u8]) {
    let path = folder.with("gguf/model.gguf", bytes).join("model.gguf");
    let Ok(gguf) = Gguf::open(&path) else { return };
    for name in gguf.tensor_names() {
        let _ = gguf.tensor(name).map(|tensor| (tensor.rows > 0).then(|| tensor.vector()));
    }
    let _ = model::describe(&path);
}

/// The tokenizer of a GGUF file.
fn vocabulary(folder: &Folder, bytes: &[u8]) {
    let path = folder.with("gguf/model.gguf", bytes).join("model.gguf");
    if let Ok(tokenizer) = base::tokenizer(&path) {
        encode(&tokenizer);
    }
}

fn safetensors(folder: &Folder, bytes: &[u8]) {
    let _ = model::describe(&folder.with("safetensors/model.safetensors", bytes));
}

fn index(folder: &Folder, bytes: &[u8]) {
    let _ = model::describe(&folder.with("index/model.safetensors.index.json", bytes));
}

fn config(folder: &Folder, bytes: &[u8]) {
    let path = folder.with("config/config.json", bytes);
    for text_only in [false, true] {
        let _ = model::check_config(Files { path: &path, text_only });
    }
}

fn tokenizer(_: &Folder, bytes: &[u8]) {
    if let Ok(tokenizer) = Tokenizer::from_json(bytes) {
        encode(&tokenizer);
        let _ = tokenizer.to_json();
    }
}

fn encode(tokenizer: &Tokenizer) {
    // What it takes for a token of its own, with and without blanks around.
    let own: String =
        tokenizer.special_ids().take(4).chain(0..4).map(|id| String::from_utf8_lossy(tokenizer.token_bytes(id)) + "  ").collect();
    for text in ["", "Hello <s> wörld\n 123 🦐", "   a\r\n<|end|>b", &own] {
        tokenizer.control_tokens(text);
        for ids in [tokenizer.encode(text, true), tokenizer.encode_plain(text)].into_iter().flatten() {
            tokenizer.decode(&ids);
        }
    }
}

/// Which is rendered as the product does it: by the worker in `CARRYON_BIN`, in a process of its own.
fn template(_: &Folder, bytes: &[u8]) {
    static WORKER: Once = Once::new();
    WORKER.call_once(|| render_apart(PathBuf::from(std::env::var_os("CARRYON_BIN").expect("CARRYON_BIN")).join("carryon-worker")));
    let Some(template) = std::str::from_utf8(bytes).ok().and_then(|text| ChatTemplate::new(text, None, Some("<s>"), Some("</s>")).ok())
    else {
        return;
    };
    let messages =
        vec![Message::new("system", "Be \"brief\"."), Message::new("user", " a\n"), Message::new("assistant", "<think>\nb</think>c")];
    let _ = template.render(&Conversation { messages, ..Conversation::default() }, 3, true);
}
