//! What inference and training both know of a head's blocks.

use carryon_crds::wire::HeadShape;

use crate::kernel::{Attention, Rotation};

/// Attention of the head's blocks: rotary positions, causal, over a window.
#[derive(Clone)]
pub(super) struct HeadAttention {
    pub width: usize,
    pub heads: usize,
    pub window: usize,
    rotation: Rotation,
}

impl HeadAttention {
    pub fn new(shape: &HeadShape) -> Self {
        let (width, heads) = (shape.width as usize, shape.heads as usize);
        Self { width, heads, window: shape.window as usize, rotation: Rotation::new(shape.rope_theta, width / heads) }
    }

    pub fn head_dim(&self) -> usize {
        self.width / self.heads
    }

    pub fn scale(&self) -> f32 {
        1.0 / (self.head_dim() as f32).sqrt()
    }

    pub fn rotation(&self) -> &Rotation {
        &self.rotation
    }

    pub fn attention(&self) -> Attention {
        Attention { heads: self.heads, scale: self.scale(), window: Some(self.window), softcap: None }
    }
}
