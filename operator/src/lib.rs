//! The operator: turns the three kinds into pods, in a cluster or as processes on this machine.
//!
//! Per kind, one file each: `observe` → `validate` → `build` → (apply) → `status`. All but observing and applying is pure:
//! validation and status are functions of [Kubernetes' own types](k8s_openapi), whoever filled them.

#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod admission;
pub mod cluster;
pub mod crd;
pub mod deployment;
pub mod job;
pub mod local;
pub mod pool;
pub mod shared;
