//! The bounds that several programs have to agree on: what can be trained can be stored, pushed and served. All of them read them here.
//!
//! | what | bound | because |
//! |---|---|---|
//! | a head | [`MAX_PARAMETERS`], and the members of its shape | |
//! | its file | [`head_bytes`], at most [`MAX_HEAD_BYTES`] | an f32 for each parameter, and a header |
//! | a checkpoint | [`MAX_CHECKPOINT_BYTES`] | weights, their average, best weights and two moments of the largest head |
//! | what a pod keeps of heads | [`head_memory`] | a share of its memory |
//! | a head that a pod takes | [`largest_head`] | it fits there once it is packed |
//! | heads on their way into a pod | [`head_memory`] once more | one of the largest, or several small ones |
//! | an upload's time | [`upload_time`] | client and pool wait equally long |
//!
//! While a pod takes a head it holds its heads, what is on its way, and a copy of the one that is packed: three shares at most.

use std::time::Duration;

/// Tokens that any sequence, sample or window may have.
pub const MAX_TOKENS: u32 = 1 << 20;

/// Width D of a base.
pub const MAX_HIDDEN_SIZE: u32 = 65_536;
/// Width w of a head.
pub const MAX_WIDTH: u32 = 8192;
/// Width of a head's SwiGLU layer.
pub const MAX_FEED_FORWARD: u32 = 65_536;
/// Transformer blocks of a head.
pub const MAX_BLOCKS: u32 = 32;
/// Attention heads of a block.
pub const MAX_ATTENTION_HEADS: u32 = 128;
/// Layers that a head taps, beside `final`.
pub const MAX_TAP_LAYERS: usize = 16;
/// Pools whose states a head reads.
pub const MAX_POOLS: usize = 4;
/// Figures of a head that are kept in a status, and bounds on them.
pub const MAX_FIGURES: usize = 16;
/// Labels of a classifier.
pub const MAX_LABELS: usize = 1000;
/// Numbers of an embedding.
pub const MAX_DIMENSIONS: u32 = 4096;
/// Scale of a head's output, in training and in a request.
pub const MAX_ALPHA: f64 = 16.0;
/// Parameters of a head, whatever its shape.
pub const MAX_PARAMETERS: u64 = 1 << 31;

/// Header of `head.safetensors`: names and shapes of its tensors, [`super::HeadShape`] with its labels, [`super::BaseReference`].
pub const HEAD_HEADER_BYTES: u64 = 1 << 20;
/// The largest `head.safetensors`.
pub const MAX_HEAD_BYTES: u64 = head_bytes(MAX_PARAMETERS);
/// Header of a checkpoint.
pub const CHECKPOINT_HEADER_BYTES: u64 = 16 << 20;
/// The largest checkpoint.
pub const MAX_CHECKPOINT_BYTES: u64 = 5 * 4 * MAX_PARAMETERS + CHECKPOINT_HEADER_BYTES;

/// Body of a request that is no head: rows of a remote loss, of which a trainer sends as many as fit.
pub const MAX_REQUEST_BYTES: u64 = 512 << 20;

/// The part of a pod's memory that its heads may take.
const HEAD_SHARE: u64 = 8;
/// What heads may take in a pod however small.
const MIN_HEAD_MEMORY: u64 = 256 << 20;
/// An upload is cut off when it is slower, bytes a second.
const SLOWEST_UPLOAD: u64 = 8 << 20;
/// What every upload has beside that.
const UPLOAD_GRACE: Duration = Duration::from_secs(120);

/// Bytes of the file of a head of `parameters`, at most.
pub const fn head_bytes(parameters: u64) -> u64 {
    4 * parameters + HEAD_HEADER_BYTES
}

/// What heads may take, packed, in a pod with `memory` bytes.
pub fn head_memory(memory: u64) -> u64 {
    (memory / HEAD_SHARE).max(MIN_HEAD_MEMORY)
}

/// The largest file of a head that a pod with `memory` bytes takes. Packed it is up to an eighth larger: columns are filled up to 32.
pub fn largest_head(memory: u64) -> u64 {
    (head_memory(memory) / 8 * 7).min(MAX_HEAD_BYTES)
}

/// How long `bytes` may be on their way.
pub fn upload_time(bytes: u64) -> Duration {
    UPLOAD_GRACE + Duration::from_secs(bytes / SLOWEST_UPLOAD)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn a_head_of_a_billion_parameters_is_served_by_a_pod_that_has_the_memory() {
        let bytes = head_bytes(1_000_000_000);
        assert!((4_000_000_000..=MAX_HEAD_BYTES).contains(&bytes));
        assert!(largest_head(36 * GIB) >= bytes);
        assert!(largest_head(32 * GIB) < bytes, "a smaller pod says so before it is trained");
        assert!(largest_head(80 * GIB) >= MAX_HEAD_BYTES);
        assert_eq!(largest_head(u64::MAX), MAX_HEAD_BYTES);
    }

    #[test]
    fn heads_never_take_more_than_three_eighths_of_a_pod_that_is_not_tiny() {
        for memory in [2 * GIB, 16 * GIB, 1024 * GIB] {
            let (kept, underway, packing) = (head_memory(memory), head_memory(memory), largest_head(memory));
            assert!(kept + underway + packing <= memory / 8 * 3, "{memory}");
            assert!(packing + packing / 8 <= kept, "packed, with its columns filled up, it fits");
        }
        assert!(largest_head(0) >= head_bytes(50_000_000));
    }

    #[test]
    fn the_largest_checkpoint_holds_five_copies_of_the_largest_head() {
        assert_eq!(MAX_CHECKPOINT_BYTES - CHECKPOINT_HEADER_BYTES, 5 * (MAX_HEAD_BYTES - HEAD_HEADER_BYTES));
    }

    #[test]
    fn an_upload_of_a_billion_parameters_has_minutes() {
        assert_eq!(upload_time(0), UPLOAD_GRACE);
        assert_eq!(upload_time(head_bytes(1_000_000_000)).as_secs(), 120 + 476);
    }
}
