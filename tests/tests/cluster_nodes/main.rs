//! Carry-On on real nodes: the chart installed, the real model trained on and served, and parts of it lost on the way.
#![allow(clippy::unwrap_used)]

mod anywhere;
mod closed;
mod key;
mod load;
mod operations;
mod proxy;
mod quickstart;
mod shared;
mod world;
