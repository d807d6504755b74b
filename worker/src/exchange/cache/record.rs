//! Header of a cache record.

use std::hash::Hasher as _;

use sha2::{Digest as _, Sha256};
use twox_hash::XxHash3_64;

use super::SampleKey;
use crate::exchange::states::SequenceStates;

/// Bytes of an encoded header.
pub(super) const HEADER_BYTES: usize = 128;
const MAGIC: &[u8; 8] = b"carryon1";
/// Bytes covered by the header's own checksum.
const COVERED: usize = HEADER_BYTES - 32;

/// What precedes the rows of a record.
///
/// Workers before this one wrote zeros for `quick` and do not read it; they and this one read each other's records.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) sample: SampleKey,
    pub(super) tokens: u32,
    /// Bytes of the rows over all taps.
    pub(super) payload: u64,
    /// SHA-256 of the rows: made once, and asked for where there is nothing quicker.
    digest: [u8; 32],
    /// XXH3 of the rows, by which each read is checked: it finds damage as surely, at the speed of memory.
    quick: u64,
}

impl Header {
    pub(super) fn new(sample: SampleKey, states: &SequenceStates) -> Self {
        let (mut digest, mut quick) = (Sha256::new(), XxHash3_64::new());
        for tap in &states.taps {
            digest.update(tap);
            quick.write(tap);
        }
        let (tokens, payload) = (states.tokens as u32, states.bytes() as u64);
        Self { sample, tokens, payload, digest: digest.finalize().into(), quick: quick.finish() }
    }

    /// Whether these are the rows that were written.
    pub(super) fn fits(&self, rows: &[u8]) -> bool {
        match self.quick {
            0 => Sha256::digest(rows)[..] == self.digest,
            quick => XxHash3_64::oneshot(rows) == quick,
        }
    }

    pub(super) fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..8].copy_from_slice(MAGIC);
        bytes[8..40].copy_from_slice(&self.sample.0);
        bytes[40..44].copy_from_slice(&self.tokens.to_le_bytes());
        bytes[48..56].copy_from_slice(&self.payload.to_le_bytes());
        bytes[56..88].copy_from_slice(&self.digest);
        bytes[88..COVERED].copy_from_slice(&self.quick.to_le_bytes());
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
            digest: bytes[56..88].try_into().ok()?,
            quick: u64::from_le_bytes(bytes[88..COVERED].try_into().ok()?),
        })
    }
}
