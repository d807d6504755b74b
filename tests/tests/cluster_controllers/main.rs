//! The controllers against a real API server and Kubernetes' own controllers; only the kubelets are played.
#![allow(clippy::unwrap_used)]

mod anew;
mod attempts;
mod closed;
mod deaths;
mod edits;
mod ends;
mod faults;
mod leaders;
mod namespaces;
mod queues;
mod shared;
mod stored;
mod told;
mod upgrades;
mod users;
mod watched;
mod world;
