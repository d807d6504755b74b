//! What stands before the tensors of a safetensors file, written here alone.
//!
//! `safetensors::serialize` orders the metadata by a hash that differs from run to run, and copies the tensors; a head is named by its bytes,
//! and states go out as they lie.

use safetensors::Dtype;
use serde_json::{Value, json};

/// Number of the header's bytes and the header: metadata, then names, types and shapes of the tensors that follow in this order.
pub fn header<'a>(metadata: &[(&str, &str)], tensors: impl Iterator<Item = (&'a str, Dtype, &'a [usize])>) -> Vec<u8> {
    let member = |name: &str, value: &Value| format!("{}:{value}", Value::from(name));
    let object = |members: Vec<String>| format!("{{{}}}", members.join(","));
    let mut members = Vec::new();
    if !metadata.is_empty() {
        let entries = metadata.iter().map(|(name, value)| member(name, &Value::from(*value)));
        members.push(format!("\"__metadata__\":{}", object(entries.collect())));
    }
    let mut begin = 0;
    for (name, dtype, shape) in tensors {
        let end = begin + shape.iter().product::<usize>() * dtype.bitsize() / 8;
        members.push(member(name, &json!({ "data_offsets": [begin, end], "dtype": dtype, "shape": shape })));
        begin = end;
    }
    let mut text = object(members).into_bytes();
    text.resize(text.len().next_multiple_of(8), b' ');
    [&(text.len() as u64).to_le_bytes()[..], &text[..]].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Heads that were trained are named by the digest of these bytes.
    #[test]
    fn a_header_has_the_same_bytes_for_ever() {
        let tensors = [("a \"b\"", Dtype::F32, &[2, 3][..]), ("cd", Dtype::BF16, &[][..])];
        let header = header(&[("k", "{\"x\":1}"), ("l", "é")], tensors.into_iter());
        let text = r#"{"__metadata__":{"k":"{\"x\":1}","l":"é"},"a \"b\"":{"data_offsets":[0,24],"dtype":"F32","shape":[2,3]},"#;
        let text = format!("{text}{:63}", r#""cd":{"data_offsets":[24,26],"dtype":"BF16","shape":[]}}"#);
        assert_eq!(header[..8], (text.len() as u64).to_le_bytes());
        assert_eq!(String::from_utf8(header[8..].to_vec()).unwrap(), text);
    }
}
