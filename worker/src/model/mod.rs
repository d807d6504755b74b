//! One decoder with taps over weights read from GGUF or safetensors, on any device.
//!
//! The residual stream is f32; products are in the pool's number type. **Invariant** on a CPU a sequence's states and keys do not depend on the
//! other sequences of a pass, on how it is cut into passes and pieces, or on the number of threads: equal bits.

mod checkpoint;
mod config;
mod decoder;
mod digest;
mod encoding;
mod error;
mod experts;
mod families;
pub mod gguf;
mod lm_head;
mod quantization;
mod safetensors;
mod shards;
mod tensor;
mod weights;

use std::ops::ControlFlow;
use std::path::Path;

use carryon_crds::pool::Dtype;

use crate::kernel::{Arena, Backend, PageLayout, Result, Stored};
use checkpoint::Checkpoint;
pub use checkpoint::Files;
use config::Keys;
pub use config::{AttentionConfig, ModelConfig};
use decoder::Decoder;
pub use decoder::{Capture, Pause, Plan, Slot, States, Tap};
pub use error::ModelError;
use gguf::Gguf;
pub use lm_head::LmHead;
use weights::Weights;

/// That a model whose `config.json` lies in the folder could be loaded, as far as that says it.
///
/// # Errors
/// When it cannot be read, or asks for what the decoder does not do.
pub fn check_config(folder: Files<'_>) -> std::result::Result<(), ModelError> {
    config::of_folder(folder).map(drop)
}

/// The same of a GGUF file of which only a beginning is at `path` yet, and that will be `length` bytes long: false when it does not say enough. Of
/// several files that are one, it is of the first. What is damaged is left to whoever has all of it.
///
/// # Errors
/// When it cannot be read; when its architecture, or the type of a tensor, is not supported.
pub fn check_gguf(path: &Path, length: u64) -> std::result::Result<bool, ModelError> {
    let gguf = match Gguf::open_beginning(path, length) {
        Ok(Some(gguf)) => gguf,
        Ok(None) => return Ok(false),
        Err(ModelError::Invalid { .. }) => return Ok(true),
        Err(error) => return Err(error),
    };
    ModelConfig::read(&Keys::gguf(&gguf)?)?;
    gguf.check_kinds()?;
    Ok(true)
}

/// What a checkpoint says of its architecture; of its tensors only where they lie is read.
///
/// # Errors
/// As for [`Model::load`].
pub fn describe<'a>(files: impl Into<Files<'a>>) -> std::result::Result<ModelConfig, ModelError> {
    Checkpoint::open(files.into())?.config()
}

/// A loaded base model. Shared by reference: all state of a sequence is in its [`PageTable`](crate::kernel::PageTable).
pub struct Model<B: Backend> {
    /// Sizes and constants.
    pub config: ModelConfig,
    /// Number type of products and states.
    pub dtype: Dtype,
    /// What its large matrices are kept as.
    pub stored: Stored,
    /// Where it lies.
    pub backend: B,
    decoder: Decoder<B>,
    weights: Weights<B>,
    digest: String,
}

impl<B: Backend> Model<B> {
    /// Loads a GGUF file or a folder (`config.json` and `*.safetensors`), and packs its weights as `stored` says.
    ///
    /// # Errors
    /// When a file cannot be read, is damaged, or asks for what the decoder does not do; the text names file and key or tensor. When the weights do
    /// not fit on the device.
    pub fn load<'a>(files: impl Into<Files<'a>>, stored: impl Into<Stored>, backend: B) -> std::result::Result<Self, ModelError> {
        let checkpoint = Checkpoint::open(files.into())?;
        let config = checkpoint.config()?;
        let digest = checkpoint.digest_beside()?;
        let stored = stored.into();
        let weights = Weights::load(&backend, &checkpoint, &config, stored)?;
        let (digest, decoder) = (digest.join()?, Decoder::new(&config));
        Ok(Self { config, dtype: stored.products(), stored, backend, decoder, weights, digest })
    }

    /// `sha256:…` of the weight file, or of `config.json` and all files with its weights, one after the other.
    pub fn weights_digest(&self) -> &str {
        &self.digest
    }

    /// Name from the checkpoint.
    pub fn name(&self) -> &str {
        &self.config.name
    }

    /// Bytes of its matrices on the device.
    pub fn weight_bytes(&self) -> usize {
        self.weights.bytes()
    }

    /// The LM head.
    pub fn lm_head(&self) -> &LmHead<B> {
        &self.weights.lm_head
    }

    /// What a page of keys and values holds: all layers, for sequences that are continued.
    pub fn page_layout(&self) -> PageLayout {
        let AttentionConfig { key_value_heads: heads, head_dim, latent, .. } = self.config.attention();
        let latent = latent.map(|latent| latent.rank);
        PageLayout { layers: self.config.layers.len(), heads: *heads, head_dim: *head_dim, latent, dtype: self.dtype }
    }

    /// The same of one layer, enough for sequences that come in one pass and are not continued: each layer uses it in its turn.
    pub fn single_pass_layout(&self) -> PageLayout {
        PageLayout { layers: 1, ..self.page_layout() }
    }

    /// Runs the tokens of all slots through the decoder, a layer at a time in pieces as `plan` says, and hands what is captured to
    /// `states`. `pause` is called between two pieces: it may run another pass meanwhile, on other pages. When it breaks, the pass ends and what
    /// the slots' pages hold is of no meaning any more.
    ///
    /// # Errors
    /// The device failed.
    ///
    /// # Panics
    /// When a token is not in the vocabulary, or a slot has no page for a position.
    pub fn run(
        &self,
        arena: &mut Arena<B>,
        slots: &mut [Slot<'_>],
        plan: Plan<'_>,
        states: States<'_, B>,
        pause: Pause<'_>,
    ) -> Result<ControlFlow<()>> {
        self.decoder.run(self, arena, slots, plan, states, pause)
    }

    /// Runs the tokens of all slots in one piece; one entry for each capture.
    ///
    /// # Errors
    /// As for [`Model::run`].
    ///
    /// # Panics
    /// As for [`Model::run`].
    pub fn forward(&self, arena: &mut Arena<B>, slots: &mut [Slot<'_>], captures: &[Capture]) -> Result<Vec<B::Rows>> {
        let mut found: Vec<B::Rows> = captures.iter().map(|_| B::Rows::default()).collect();
        let mut keep = |index: usize, _first: usize, rows: B::Rows| {
            found[index] = rows;
            Ok(())
        };
        let flow = self.run(arena, slots, Plan { piece_rows: usize::MAX, captures }, &mut keep, &mut |_| Ok(ControlFlow::Continue(())))?;
        debug_assert!(flow.is_continue(), "nobody breaks");
        Ok(found)
    }
}
