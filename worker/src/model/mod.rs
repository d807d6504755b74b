//! One decoder with taps over weights read from GGUF or safetensors.
