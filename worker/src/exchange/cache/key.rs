//! What names a cache, and a sequence in it.

use carryon_crds::common::Taps;
use carryon_crds::job::HiddenStatesDtype;
use carryon_crds::wire::{Identity, ModelDescription, Numerics};
use serde_json::Value;
use sha2::{Digest as _, Sha256};

use super::records::Layout;
use crate::exchange::wire::{FINAL, row_formats, tap_names};
use crate::numbers::RowFormat;

/// What the states of a cache depend on, beside the tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CacheKey {
    /// The base.
    pub identity: Identity,
    /// How it computes.
    pub numerics: Numerics,
    /// Where the states are read.
    pub taps: Taps,
    /// Width D of a row.
    pub hidden_size: usize,
    /// How rows of layers are written.
    pub dtype: HiddenStatesDtype,
}

impl CacheKey {
    /// The key of `taps` in the model of a pool, layers as `dtype` says.
    pub fn new(description: &ModelDescription, taps: &Taps, dtype: HiddenStatesDtype) -> Self {
        let (identity, numerics) = (description.identity.clone(), description.numerics.clone());
        Self { identity, numerics, taps: taps.clone(), hidden_size: description.hidden_size as usize, dtype }
    }

    pub(super) fn text(&self) -> String {
        let (numerics, taps) = (self.numerics.key(), tap_names(&self.taps));
        let mut key = serde_json::json!({"identity": self.identity, "numerics": numerics, "taps": taps, "hiddenSize": self.hidden_size});
        if self.dtype != HiddenStatesDtype::Model {
            key["dtype"] = serde_json::json!(self.dtype);
        }
        key.to_string()
    }

    /// How the rows of each tap are written.
    pub fn formats(&self) -> Vec<RowFormat> {
        row_formats(&self.taps, self.numerics.dtype, self.dtype)
    }

    fn row_bytes(&self, formats: &[RowFormat]) -> Vec<usize> {
        formats.iter().map(|format| format.row_bytes(self.hidden_size)).collect()
    }

    /// How records of this key are read.
    pub(super) fn layout(&self) -> Layout {
        Layout { row_bytes: self.row_bytes(&self.formats()), picks: (0..self.taps.count()).collect() }
    }

    /// How records are read whose key has this text: None when they do not hold all that this key names.
    pub(super) fn layout_in(&self, other: &str) -> Option<Layout> {
        let read = |text: &str| serde_json::from_str::<serde_json::Map<String, Value>>(text).ok();
        let (mut other, mut own) = (read(other)?, read(&self.text())?);
        let (theirs, ours) = (other.remove("taps")?, own.remove("taps")?);
        let (theirs, ours) = (theirs.as_array()?, ours.as_array()?);
        let picks = ours.iter().map(|tap| theirs.iter().position(|other| other == tap)).collect::<Option<Vec<_>>>()?;
        // As many layers as there are, and `final` where it is named.
        let last = theirs.iter().filter(|tap| *tap == FINAL).count();
        let taps = Taps { layers: vec![0; theirs.len() - last], final_norm: last > 0 };
        let row_bytes = self.row_bytes(&row_formats(&taps, self.numerics.dtype, self.dtype));
        (other == own).then_some(Layout { row_bytes, picks })
    }

    /// Bytes on disk for sequences of these lengths in tokens.
    pub fn estimate(&self, lengths: impl IntoIterator<Item = usize>) -> u64 {
        let layout = self.layout();
        lengths.into_iter().map(|tokens| layout.record_bytes(tokens)).sum()
    }
}

/// Names a sequence in a cache: the digest of its token ids.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SampleKey(pub(super) [u8; 32]);

impl SampleKey {
    /// The key of a sequence.
    pub fn of(tokens: &[u32]) -> Self {
        let mut hasher = Sha256::new();
        tokens.iter().for_each(|token| hasher.update(token.to_le_bytes()));
        Self(hasher.finalize().into())
    }
}
