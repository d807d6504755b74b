//! What a gateway says of itself.

use serde::{Deserialize, Serialize};

/// Longest API key, bytes.
pub const MAX_KEY_BYTES: usize = 64 << 10;

/// Answer of a gateway's `GET /status`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GatewayStatus {
    /// How each API key is found, in the order of the spec.
    pub api_keys: Vec<KeyState>,
}

/// How an API key is found. Those that no client can send come last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KeyState {
    /// As it is sent.
    Usable,
    /// With white space around it, which is not part of it: it cannot be sent in a header.
    Trimmed,
    /// There is nothing but white space.
    Empty,
    /// With a line break or control character in it, or too long to be sent.
    Unusable,
    /// There is no such file.
    Missing,
}

impl KeyState {
    /// The key in a file's `content`, and how it is found.
    pub fn of(content: &[u8]) -> (Self, Option<&[u8]>) {
        let key = content.trim_ascii();
        match key {
            [] => (Self::Empty, None),
            _ if content.len() > MAX_KEY_BYTES || key.iter().any(u8::is_ascii_control) => (Self::Unusable, None),
            _ if key.len() < content.len() => (Self::Trimmed, Some(key)),
            _ => (Self::Usable, Some(key)),
        }
    }

    /// Whether a client can send it.
    pub fn is_usable(self) -> bool {
        matches!(self, Self::Usable | Self::Trimmed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // What `kubectl create secret generic key --from-literal`, `echo ... | base64` and careless people make of a key.
    #[test]
    fn white_space_around_a_key_is_not_part_of_it() {
        let found = |content: &str| KeyState::of(content.as_bytes()).0;
        assert_eq!(KeyState::of(b"sk-1"), (KeyState::Usable, Some(&b"sk-1"[..])));
        assert_eq!(KeyState::of(b" sk-1\r\n"), (KeyState::Trimmed, Some(&b"sk-1"[..])));
        assert_eq!([found(""), found(" \n")], [KeyState::Empty; 2]);
        assert_eq!([found("sk-1\nsk-2\n"), found("sk\x7f"), found(&"x".repeat(MAX_KEY_BYTES + 1))], [KeyState::Unusable; 3]);
        assert_eq!(serde_json::to_string(&KeyState::Trimmed).unwrap(), "\"trimmed\"");
    }
}
