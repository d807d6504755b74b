//! Packed matrices and the products over them, in bf16 and f32.
