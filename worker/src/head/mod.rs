//! The head: bridge, blocks, gate, LM-head loss, artifact.
//!
//! ```text
//! u0 = Σ_k B_k · norm(ĥ_k)              bridge: one projection per tap
//! u  = block_n(… block_1(u0))           causal attention (RoPE) + SwiGLU, pre-norm
//! Δ  = O · norm(u)                      output, initially zero
//! g  = sigmoid(G · norm(u) + b) or 1    gate
//! y  = x̂ + α · g ⊙ Δ                    summed in f32, rounded once to the pool's number type
//! ```
//!
//! `norm` is RMSNorm without weight; the blocks' norms have one.

pub mod artifact;
pub mod inherit;
pub mod init;
mod layers;
pub mod loss;
pub mod parameters;
pub mod pass;
mod runner;

pub use artifact::{Artifact, ArtifactError};
pub use parameters::{Gradients, ShapeError, Weight, Weights};
pub use runner::{HeadSlot, Runner, RunnerError, page_layout};
