//! The worker: `base` runs a frozen model, `train` trains a head on its hidden states, `serve` answers OpenAI requests,
//! `fetch` brings a model into a folder.
//!
//! Arrows between rooms: `base → model head exchange text http`, `train → head exchange text http`, `serve → exchange text http`,
//! `model → kernel`, `head → kernel`, `fetch →` none; `base`, `train`, `serve` and `fetch` never import each other.

#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod base;
pub mod exchange;
pub mod fetch;
pub mod files;
pub mod head;
pub mod http;
pub mod kernel;
pub mod model;
pub mod numbers;
mod rows;
pub mod serve;
pub mod tensor_file;
pub mod text;
pub mod train;
