//! Integers of GGUF files, of all its eight types.

/// How many bytes an integer of the type `kind` has; none for a type that is no integer. A boolean is a byte.
pub(super) fn width(kind: u32) -> Option<usize> {
    match kind {
        0 | 1 | 7 => Some(1),
        2 | 3 => Some(2),
        4 | 5 => Some(4),
        10 | 11 => Some(8),
        _ => None,
    }
}

/// A list of integers in the bytes that it has in the file: of a list of bytes, sixteen times as many would be 128 bits each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Integers {
    signed: bool,
    width: usize,
    bytes: Vec<u8>,
}

impl Integers {
    /// `bytes` are whole integers of the type `kind`, which is `width` bytes wide.
    pub(super) fn new(kind: u32, width: usize, bytes: Vec<u8>) -> Self {
        Self { signed: matches!(kind, 1 | 3 | 5 | 11), width, bytes }
    }

    /// Every one, widened.
    pub fn iter(&self) -> impl Iterator<Item = i128> {
        self.bytes.chunks_exact(self.width).map(|bytes| {
            let negative = self.signed && bytes.last().is_some_and(|last| *last >= 0x80);
            let mut wide = [if negative { 0xFF } else { 0 }; 16];
            wide[..bytes.len()].copy_from_slice(bytes);
            i128::from_le_bytes(wide)
        })
    }
}
