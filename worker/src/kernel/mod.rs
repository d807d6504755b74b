//! The device seam: what decoder and head compute, as a few fused calls that every device answers.
//!
//! Decoder and head are written once, over [`Backend`], and training over [`Backward`], which adds the way back and the optimizers' steps. Two devices
//! stand behind it: [`cpu`], our own kernels, and [`candle`], any `Device` of candle's. Values cross between host and device in [`Backend::write`],
//! [`Backend::read`] and their kin alone.
//!
//! **Invariant** on a CPU every output element is one chain of multiply-adds over k in a fixed order. It does not depend on the other rows, on
//! chunking or on the number of threads, so a sequence alone and in a batch gives equal bits. Another device states its tolerance.

mod arena;
mod backward;
mod block;
pub mod candle;
pub mod cpu;
mod moment;
mod rotation;

use std::borrow::Cow;
use std::ops::Range;

use bytes::Bytes;
use carryon_crds::pool::Dtype;

pub use arena::{Arena, PageTable, pages_for};
pub use backward::{Backward, Change, Gate, GateGradients, Rule, Step, Trained, Weight, Weights};
pub use cpu::{Cpu, Threads};
pub use moment::{Map, Moment};
pub use rotation::Rotation;

/// Positions of a page of keys and values.
pub const PAGE: usize = 32;

/// Logits that an [`Outline`] sums up in one number.
pub const LOGIT_BLOCK: usize = 128;

/// A device that did not do what it was told: out of memory, a lost driver. Nothing that was on it can be relied on afterwards.
#[derive(Debug, thiserror::Error)]
#[error("the device failed: {0}")]
pub struct DeviceError(#[from] candle_core::Error);

/// What a call on a device comes back with.
pub type Result<T> = std::result::Result<T, DeviceError>;

/// Writes row `index` of a weight into the slice: how weights get onto a device, a row at a time and from several threads.
pub type Fill<'a> = &'a (dyn Fn(usize, &mut [f32]) + Sync);

/// How a frozen weight is kept: in the number type of its products, or in blocks of fewer bits that are widened to bf16 on the way to a product. A
/// weight in blocks is a bf16 weight of the values that they stand for: prefill and decode, alone and in a batch, compute with the same numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stored {
    /// As it is.
    As(Dtype),
    /// In blocks.
    Blocks(Bits),
}

/// What a block of 32 inputs of an output is kept as; the numbers are those of GGUF.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bits {
    /// Q8_0: codes of 8 bits times a factor; 8.5 bits a weight.
    Q8,
    /// Q4_1: codes of 4 bits times a factor, and a least value; 5 bits a weight.
    Q4,
}

impl Stored {
    /// Number type of the products.
    pub fn products(self) -> Dtype {
        match self {
            Self::As(dtype) => dtype,
            Self::Blocks(_) => Dtype::Bfloat16,
        }
    }
}

impl From<Dtype> for Stored {
    fn from(dtype: Dtype) -> Self {
        Self::As(dtype)
    }
}

/// A device and its arithmetic. `Rows` are f32 and row-major; sums are f32 whatever a matrix holds.
pub trait Backend: Clone + Send + Sync + Sized + 'static {
    /// Rows of f32 on the device. The default is a buffer that takes the shape of what is put into it.
    type Rows: Default + Send + Sync;
    /// Rows rounded to a matrix's number type.
    type Packed: Default + Send + Sync;
    /// A frozen weight, laid out for products.
    type Matrix: Send + Sync;
    /// Such weights of one shape, one for each head.
    type Heads: Send + Sync;
    /// The weight of a norm, or a bias.
    type Vector: Send + Sync;
    /// Keys and values of many sequences, in pages of [`PAGE`] positions.
    type Pages: Send;
    /// Where the rows of a pass lie in them.
    type Places: Send + Sync;

    /// Device and kernel for numbers of `dtype`, as [`carryon_crds::wire::Numerics`] names them: two names may mean two roundings.
    fn name(&self, dtype: Dtype) -> (String, String);

    /// The same device for work beside the device thread, which must not take that thread's cores.
    fn beside(&self) -> Self;

    /// Bytes that are free on a device with memory of its own.
    fn free_memory(&self) -> Option<u64>;

    /// Waits until the device has done all that it was told.
    fn finish(&self) -> Result<()>;

    /// A weight of `n` outputs and `k` inputs, rounded to what it is stored as.
    fn matrix(&self, n: usize, k: usize, stored: Stored, fill: Fill<'_>) -> Result<Self::Matrix>;

    /// Gate and up projection in one, for [`Sink::Gated`]: rows `0..width` that `fill` is asked for are the gate's, the next `width` up's.
    fn gate_up(&self, width: usize, k: usize, stored: Stored, fill: Fill<'_>) -> Result<Self::Matrix>;

    /// For each of `heads` heads a weight of `n` outputs and `k` inputs, an even number each: rows `head · n ..` that `fill` is asked for are its own.
    fn heads(&self, heads: usize, n: usize, k: usize, dtype: Dtype, fill: Fill<'_>) -> Result<Self::Heads>;

    /// The transpose of a matrix that is none, for products that go backward.
    fn transposed(&self, matrix: &Self::Matrix) -> Result<Self::Matrix>;

    /// A vector.
    fn vector(&self, values: &[f32]) -> Result<Self::Vector>;

    /// Outputs n and inputs k of a matrix.
    fn shape(matrix: &Self::Matrix) -> (usize, usize);

    /// Bytes that a matrix takes on the device.
    fn bytes(matrix: &Self::Matrix) -> usize;

    /// Number of rows.
    fn count(rows: &Self::Rows) -> usize;

    /// Copies `values` (rows of `width`) to the device.
    fn write(&self, values: &[f32], width: usize) -> Result<Self::Rows>;

    /// Rows on the host.
    fn read<'a>(&self, rows: &'a Self::Rows) -> Result<Cow<'a, [f32]>>;

    /// Copies rows to the host as numbers of `dtype`, little-endian; exact for rows that [`Self::tap`] has rounded to it.
    fn read_bytes(&self, rows: &Self::Rows, dtype: Dtype) -> Result<Bytes>;

    /// Copies rows of a matrix to the host, in the number type of its products.
    fn read_matrix(&self, matrix: &Self::Matrix, rows: Range<usize>) -> Result<Bytes>;

    /// Rows of `table` (V × D), one for each token, times `scale`.
    fn embed(&self, table: &Self::Matrix, tokens: &[u32], scale: f32, out: &mut Self::Rows) -> Result<()>;

    /// The product of rows with packed weights, `left · rightᵀ`. The rows of the left side are dealt to `right` in order: usually one part takes
    /// them all, and where many heads of one shape run together each takes its own.
    fn product(&self, left: Left<'_, Self>, right: &[Part<'_, Self>], sink: Sink<'_, Self>) -> Result<()>;

    /// Each head's own product: of every row, values `head · k ..` on the left become values `head · n ..`. The left side is not [`Left::Normed`], the
    /// sink [`Sink::Store`] or [`Sink::Pack`].
    fn product_heads(&self, left: Left<'_, Self>, right: &Self::Heads, sink: Sink<'_, Self>) -> Result<()>;

    /// Cosines and sines of each position, as [`Self::rotate`] wants them.
    fn angles(&self, rotation: &Rotation, positions: &[u32], out: &mut Self::Rows) -> Result<()>;

    /// Rotates the heads of `head_dim` values that are the first `columns` of every row. Of each head as many values as there are angles are rotated,
    /// the first ones: value i of their first half pairs with value i of their second half.
    fn rotate(&self, rows: &mut Self::Rows, columns: usize, head_dim: usize, angles: &Self::Rows) -> Result<()>;

    /// Adds a bias to every row.
    fn add_bias(&self, rows: &mut Self::Rows, bias: &Self::Vector) -> Result<()>;

    /// Puts some columns of every row through RMSNorm with this ε, in place, as many at a time as the weight has values.
    fn norm_columns(&self, rows: &mut Self::Rows, columns: Range<usize>, weight: &Self::Vector, epsilon: f32) -> Result<()>;

    /// Adds rows that are put through RMSNorm with this ε: `target += norm(rows)`.
    fn add_normed(&self, target: &mut Self::Rows, rows: &Self::Rows, weight: &Self::Vector, epsilon: f32) -> Result<()>;

    /// Adds multiples of rows to some rows: `target[at[i]] += factors[i] · rows[i]`, on a CPU in the order of i.
    fn add_scaled(&self, target: &mut Self::Rows, rows: &Self::Rows, at: &[u32], factors: &[f32]) -> Result<()>;

    /// Bounds logits: `cap · tanh(logit / cap)`, in place.
    fn softcap(&self, logits: &mut Self::Rows, cap: f32) -> Result<()>;

    /// An arena of pages; a page is taken before its first use and given back after its last.
    fn pages(&self, layout: PageLayout, count: usize) -> Result<Self::Pages>;

    /// Makes page `page` ready: all zeros.
    fn take_page(&self, pages: &mut Self::Pages, page: u32) -> Result<()>;

    /// Copies page `from` to page `to`, which is ready.
    fn copy_page(&self, pages: &mut Self::Pages, from: u32, to: u32) -> Result<()>;

    /// Page `page` is not used any more.
    fn give_page(&self, pages: &mut Self::Pages, page: u32);

    /// What the device has to know of the rows of a pass, the same for all layers that attend alike.
    fn places(&self, attention: Attention, spans: &[Span<'_>]) -> Result<Self::Places>;

    /// Writes keys and values of the rows into their pages. A row holds the keys of all heads from `column` on, then the values that keys do not hold.
    fn append(&self, pages: &mut Self::Pages, layer: usize, rows: &Self::Rows, column: usize, places: &Self::Places) -> Result<()>;

    /// Causal attention of the rows, whose first values are the (rotated) queries: `out` gets `heads ·` [`PageLayout::value_dim`] values a row, rounded
    /// to the number type of the pages.
    fn attend(&self, pages: &Self::Pages, layer: usize, rows: &Self::Rows, places: &Self::Places, out: &mut Self::Packed) -> Result<()>;

    /// The one rounding: a copy of some rows (all when `which` is none), put through RMSNorm where a weight and ε are given, rounded to `dtype`.
    fn tap(&self, rows: &Self::Rows, which: Option<&[u32]>, norm: Option<(&Self::Vector, f32)>, dtype: Dtype) -> Result<Self::Rows>;

    /// Some rows, rounded to `dtype`, to be kept.
    fn pack(&self, rows: &Self::Rows, which: Range<usize>, dtype: Dtype) -> Result<Self::Packed>;

    /// Kept rows of `width` values, one part after the other.
    fn unpack(&self, parts: &[&Self::Packed], width: usize, dtype: Dtype) -> Result<Self::Rows>;

    /// `delta ⊙ sigmoid(z + b)`, in place; the rows are dealt to the biases in order.
    fn gate(&self, z: &Self::Rows, biases: &[(usize, &Self::Vector)], delta: &mut Self::Rows) -> Result<()>;

    /// Where base and heads meet: row `at[i]` of `y` becomes `y + alpha[i] · delta[i]`, summed in f32 and rounded once to `dtype`.
    fn combine(&self, y: &mut Self::Rows, at: &[u32], alpha: &[f32], delta: &Self::Rows, dtype: Dtype) -> Result<()>;

    /// The likeliest token of every row of logits; none where a logit is not finite.
    fn greedy(&self, logits: &Self::Rows) -> Result<Vec<Option<u32>>>;

    /// Rows of finite logits as they look from afar, each at a temperature above 0.
    fn outline(&self, logits: &Self::Rows, looks: &[(u32, f32)]) -> Result<Outline>;

    /// Blocks of [`LOGIT_BLOCK`] logits to the host: a row and a block of it each. A row's last block is filled up with -∞.
    fn blocks(&self, logits: &Self::Rows, which: &[(u32, u32)]) -> Result<Vec<f32>>;

    /// Loss of each row against what `aim` says, in nats, and where `backward` (Wᵀ) is given its derivative by `y`: `logsumexp(W y) - (W y)[target]` and
    /// `(softmax(W y) - onehot(target)) · W`, or `Σ p₀ (ln p₀ - ln p)` and `(p - p₀) · W` with `p = softmax(W y)` and p₀ of the rows given; the bracket
    /// rounded to the matrix's number type, and in bf16 on a CPU without what is nearest to zero in it, a thousandth of its absolute sum at most.
    /// Holds rows × V floats meanwhile, twice as many with rows given. With a `softcap` c the logits are
    /// `c · tanh(W y / c)`, and the bracket is multiplied by 1 - (logit / c)².
    fn losses(
        &self,
        y: &Self::Rows,
        lm_head: &Self::Matrix,
        backward: Option<&Self::Matrix>,
        aim: Aim<'_, Self>,
        softcap: Option<f32>,
    ) -> Result<(Vec<f32>, Option<Self::Rows>)>;
}

/// What rows of logits are compared with.
pub enum Aim<'a, B: Backend> {
    /// A token each.
    Tokens(&'a [u32]),
    /// The probabilities that these rows have at the same LM head.
    Rows(&'a B::Rows),
}

/// The left side of a product.
pub enum Left<'a, B: Backend> {
    /// Rows, rounded to the number type of the right side.
    Plain(&'a B::Rows),
    /// Rows put through RMSNorm with this ε and each part's weight, then rounded.
    Normed(&'a B::Rows, f32),
    /// Rows that are already rounded.
    Packed(&'a B::Packed),
}

/// A matrix of a product and the rows that meet it.
pub struct Part<'a, B: Backend> {
    /// Rows of the left side.
    pub rows: usize,
    /// What they are multiplied with; all parts have the same shape.
    pub matrix: &'a B::Matrix,
    /// The norm's weight, for [`Left::Normed`]; ones when absent.
    pub norm: Option<&'a B::Vector>,
}

/// Where a product goes.
pub enum Sink<'a, B: Backend> {
    /// Becomes the product.
    Store(&'a mut B::Rows),
    /// The product is added to it.
    Add(&'a mut B::Rows),
    /// Becomes the product, rounded to the matrix's number type.
    Pack(&'a mut B::Packed),
    /// Becomes `activation(gate) · up` of a matrix made by [`Backend::gate_up`], rounded.
    Gated(&'a mut B::Packed, Activation),
}

/// What a gate goes through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// x · sigmoid(x).
    Silu,
    /// GELU with its tanh formula: x/2 · (1 + tanh(√(2/π) · (x + 0.044715 x³))).
    GeluTanh,
}

/// Rows of logits from afar, enough to say where their likely tokens are: ⌈V / [`LOGIT_BLOCK`]⌉ numbers for each look, one look after the other.
#[derive(Clone, Debug, Default)]
pub struct Outline {
    /// The largest logit of each block.
    pub maxima: Vec<f32>,
    /// Σ e^((logit - largest of the row) / temperature) of each block.
    pub weights: Vec<f32>,
}

/// What a page holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageLayout {
    /// Layers.
    pub layers: usize,
    /// Key/value heads of a layer.
    pub heads: usize,
    /// Values of a key, an even number.
    pub head_dim: usize,
    /// Of latent attention: so many of a key's values, the last ones, are the value too, an even number. Without it a value is as long as a key.
    pub latent: Option<usize>,
    /// Number type of keys and values.
    pub dtype: Dtype,
}

impl PageLayout {
    /// Values of a value.
    pub fn value_dim(&self) -> usize {
        self.latent.unwrap_or(self.head_dim)
    }

    /// Values of a position's keys, and of the values that keys do not hold.
    pub(in crate::kernel) fn width(&self) -> usize {
        self.heads * self.head_dim * if self.latent.is_some() { 1 } else { 2 }
    }

    /// Bytes of a page.
    pub fn bytes(&self) -> usize {
        cpu::page_words(self) * 4
    }
}

/// How queries see keys.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Attention {
    /// Query heads; a multiple of the pages' heads.
    pub heads: usize,
    /// Factor of the scores, usually 1/√head_dim.
    pub scale: f32,
    /// Positions each position sees at most, itself included; all before it when absent.
    pub window: Option<usize>,
    /// Bound of the scores, which become `softcap · tanh(score / softcap)`; none when absent.
    pub softcap: Option<f32>,
}

/// The first position that the one at `position` sees in a window; all from the first on without one.
pub fn first_seen(window: Option<usize>, position: usize) -> usize {
    window.map_or(0, |window| (position + 1).saturating_sub(window))
}

/// The rows of one sequence in a pass: the last of the positions that it has.
#[derive(Clone, Copy, Debug)]
pub struct Span<'a> {
    /// Rows.
    pub rows: usize,
    /// Positions up to the last of these rows.
    pub length: usize,
    /// The page of each 32 positions from the first on; no page is read that lies wholly outside the window.
    pub pages: &'a [u32],
}
