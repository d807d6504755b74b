//! The pool over loopback: a listening server, the real client, against the model and head called directly.

#![allow(clippy::unwrap_used)]

#[path = "../common/mod.rs"]
mod common;

mod answers;
mod damage;
mod ends;
mod harness;
mod interrupted;
mod large;
mod process;
mod refusals;
mod shutdown;
mod silent;
mod templates;
mod trainers;
mod versions;
mod windows;
