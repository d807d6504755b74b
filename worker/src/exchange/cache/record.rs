//! Header of a cache record.

use sha2::{Digest as _, Sha256};

use super::SampleKey;
use crate::exchange::states::SequenceStates;

/// Bytes of an encoded header.
pub(super) const HEADER_BYTES: usize = 128;
const MAGIC: &[u8; 8] = b"carryon1";
/// Bytes covered by the header's own checksum.
const COVERED: usize = HEADER_BYTES - 32;

/// What precedes the rows of a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) sample: SampleKey,
    pub(super) tokens: u32,
    /// Bytes of the rows over all taps.
    pub(super) payload: u64,
    /// SHA-256 of the rows.
    pub(super) checksum: [u8; 32],
}

impl Header {
    pub(super) fn new(sample: SampleKey, states: &SequenceStates) -> Self {
        let mut hasher = Sha256::new();
        states.taps.iter().for_each(|tap| hasher.update(tap));
        Self { sample, tokens: states.tokens as u32, payload: states.bytes() as u64, checksum: hasher.finalize().into() }
    }

    pub(super) fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..8].copy_from_slice(MAGIC);
        bytes[8..40].copy_from_slice(&self.sample.0);
        bytes[40..44].copy_from_slice(&self.tokens.to_le_bytes());
        bytes[48..56].copy_from_slice(&self.payload.to_le_bytes());
        bytes[56..88].copy_from_slice(&self.checksum);
        let own = Sha256::digest(&bytes[..COVERED]);
        bytes[COVERED..].copy_from_slice(&own);
        bytes
    }

    /// None when the bytes are not an undamaged header.
    pub(super) fn decode(bytes: &[u8; HEADER_BYTES]) -> Option<Self> {
        if &bytes[..8] != MAGIC || Sha256::digest(&bytes[..COVERED])[..] != bytes[COVERED..] {
            return None;
        }
        Some(Self {
            sample: SampleKey(bytes[8..40].try_into().ok()?),
            tokens: u32::from_le_bytes(bytes[40..44].try_into().ok()?),
            payload: u64::from_le_bytes(bytes[48..56].try_into().ok()?),
            checksum: bytes[56..88].try_into().ok()?,
        })
    }
}
