//! One decoder with taps over weights read from GGUF or safetensors.
//!
//! The residual stream is f32; products are in the pool's dtype. **Invariant**: a sequence's states and keys do not depend on the other
//! sequences of a pass, on how it is cut into passes, or on the number of threads: equal bits.

mod checkpoint;
mod config;
mod decoder;
mod digest;
mod error;
pub mod gguf;
mod kv;
mod lm_head;
mod read;
mod safetensors;
mod shards;
mod tensor;
mod weights;

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

use carryon_crds::common::Taps;
use carryon_crds::pool::Dtype;

use crate::kernel::{Precision, Threads};
use checkpoint::Checkpoint;
pub use config::ModelConfig;
use decoder::{Decoder, Pass};
pub use decoder::{Slot, States};
pub use error::ModelError;
pub use kv::Kv;
pub use lm_head::LmHead;
use weights::Weights;

/// A loaded base model. Shared by reference: all state of a sequence is in its [`Kv`].
pub struct Model {
    /// Sizes and constants.
    pub config: ModelConfig,
    precision: Precision,
    decoder: Decoder,
    weights: Weights,
    digest: String,
    threads: Arc<Threads>,
}

impl Model {
    /// Loads the GGUF file or the folder (`config.json` and `*.safetensors`) at `path`, and packs its weights for products in `dtype`.
    ///
    /// # Errors
    /// When a file cannot be read, is damaged, or asks for what the decoder does not do; the text names file and key or tensor.
    pub fn load(path: &Path, dtype: Dtype, threads: Arc<Threads>) -> Result<Self, ModelError> {
        let checkpoint = Checkpoint::open(path)?;
        let (config, precision) = (checkpoint.config()?, Precision::for_dtype(dtype));
        let digest = checkpoint.digest_beside()?;
        let weights = Weights::load(&checkpoint, &config, precision, &threads)?;
        let (digest, decoder) = (digest.join()?, Decoder::new(&config, precision));
        Ok(Self { config, precision, decoder, weights, digest, threads })
    }

    /// `sha256:…` of the weight file, or of `config.json` and all files with its weights, one after the other.
    pub fn weights_digest(&self) -> &str {
        &self.digest
    }

    /// Name from the checkpoint.
    pub fn name(&self) -> &str {
        &self.config.name
    }

    /// Name of the matrix kernel in use, e.g. `avx512_bf16`.
    pub fn kernel(&self) -> &'static str {
        crate::kernel::name(self.precision)
    }

    /// The LM head.
    pub fn lm_head(&self) -> &LmHead {
        &self.weights.lm_head
    }

    /// An empty cache for a sequence that will be continued.
    pub fn new_kv(&self) -> Kv {
        Kv::new(&self.config, self.precision)
    }

    /// A cache for a sequence that comes in one pass and is not continued: a layer's memory instead of all layers'.
    pub fn single_pass_kv(&self) -> Kv {
        Kv::single_pass(&self.config, self.precision)
    }

    /// Runs the tokens of all slots through the decoder and returns their hidden states at `taps`.
    ///
    /// `pause` is called between layers: it may run another pass meanwhile. When it breaks, the caches are as before and the result is `None`.
    ///
    /// # Panics
    /// When a token is not in the vocabulary.
    pub fn forward(&self, slots: &mut [Slot<'_>], taps: &Taps, pause: &mut dyn FnMut() -> ControlFlow<()>) -> Option<States> {
        let pass = Pass { config: &self.config, weights: &self.weights, threads: &self.threads };
        self.decoder.forward(pass, slots, taps, pause)
    }
}
