//! What reads files of strangers, each as a function of bytes that may do anything but panic, hang, or take memory without bound.

mod bounded;

use std::path::{Path, PathBuf};

use carryon_worker::model::{self, gguf::Gguf};
use carryon_worker::text::{ChatTemplate, Conversation, Tokenizer};

pub use bounded::Bounded;

/// A reader.
pub type Target = fn(&Folder, &[u8]);

/// Every reader, by the name of its folder in `corpus/`.
pub const TARGETS: [(&str, Target); 6] =
    [("gguf", gguf), ("safetensors", safetensors), ("index", index), ("config", config), ("tokenizer", tokenizer), ("template", template)];

const CONFIG: &[u8] = include_bytes!("../corpus/config/llama.json");
const CONVERSATION: &str = r#"{"messages": [{"role": "system", "content": "a"}, {"role": "user", "content": "b\n"}, {"role": "assistant", "content": "c <x>", "tool_calls": [{"type": "function", "id": "1", "function": {"name": "f", "arguments": {"a": [1, null]}}}]}, {"role": "tool", "content": "d"}], "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}], "chat_template_kwargs": {"enable_thinking": true}}"#;

/// Where readers of files find them: in memory where there is such a place.
pub struct Folder(tempfile::TempDir);

impl Folder {
    /// With the files beside which the fuzzed ones stand.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn new() -> std::io::Result<Self> {
        let memory = Path::new("/dev/shm");
        let folder = if memory.is_dir() { tempfile::tempdir_in(memory)? } else { tempfile::tempdir()? };
        for name in ["safetensors", "index", "config"] {
            std::fs::create_dir(folder.path().join(name))?;
            std::fs::write(folder.path().join(name).join("config.json"), CONFIG)?;
        }
        std::fs::write(folder.path().join("index/a.safetensors"), tensors("a"))?;
        std::fs::write(folder.path().join("index/b.safetensors"), tensors("b"))?;
        std::fs::write(folder.path().join("config/model.safetensors"), tensors("a"))?;
        Ok(Self(folder))
    }

    fn put(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.0.path().join(name);
        std::fs::write(&path, bytes).expect("room for a small file");
        path
    }
}

/// A file with one tensor of one number.
fn tensors(name: &str) -> Vec<u8> {
    let header = format!(r#"{{"{name}":{{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}}}"#);
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &[0; 4]].concat()
}

fn gguf(folder: &Folder, bytes: &[u8]) {
    let path = folder.put("model.gguf", bytes);
    if let Ok(gguf) = Gguf::open(&path) {
        gguf.tensor_names().for_each(drop);
        let _ = model::describe(&path);
    }
}

fn safetensors(folder: &Folder, bytes: &[u8]) {
    let path = folder.put("safetensors/model.safetensors", bytes);
    let _ = path.parent().map(model::describe);
}

fn index(folder: &Folder, bytes: &[u8]) {
    let path = folder.put("index/model.safetensors.index.json", bytes);
    let _ = path.parent().map(model::describe);
}

fn config(folder: &Folder, bytes: &[u8]) {
    let path = folder.put("config/config.json", bytes);
    let _ = path.parent().map(model::describe);
}

fn tokenizer(_: &Folder, bytes: &[u8]) {
    let Ok(tokenizer) = Tokenizer::from_json(bytes) else { return };
    for text in ["", "Hello <s> wörld\n 123 🦐", "   a\r\n<|end|>b"] {
        tokenizer.control_tokens(text);
        if let Ok(ids) = tokenizer.encode(text, true) {
            tokenizer.decode(&ids);
        }
    }
}

fn template(_: &Folder, bytes: &[u8]) {
    let (Ok(text), Ok(conversation)) = (std::str::from_utf8(bytes), Conversation::parse(CONVERSATION)) else { return };
    if let Ok(template) = ChatTemplate::new(text, Some("<s>"), Some("</s>")) {
        let _ = template.render(&conversation, conversation.messages.len(), true);
    }
}
