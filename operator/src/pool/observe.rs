//! What a pool's validation and status look at, in Kubernetes' own types.

use std::collections::BTreeMap;

use carryon_crds::wire::{FetchReport, ModelDescription};
use k8s_openapi::api::apps::v1::ControllerRevision;
use k8s_openapi::api::core::v1::{Node, PersistentVolumeClaim, Pod};

/// The world around a pool at one moment.
#[derive(Clone, Debug, Default)]
pub struct Observed {
    /// The claim that holds the weights, or that they are fetched into.
    pub claim: Option<PersistentVolumeClaim>,
    /// The pool's pods.
    pub pods: Vec<Pod>,
    /// Why the API server refuses pods of the StatefulSet, when it has fewer than it wants.
    pub refused: Option<String>,
    /// What ready pods say of their model, by pod name.
    pub models: BTreeMap<String, ModelDescription>,
    /// What pods that fetch their model say of that, by pod name.
    pub fetches: BTreeMap<String, FetchReport>,
    /// What its pods were rendered as.
    pub revisions: Vec<ControllerRevision>,
    /// The cluster's nodes; none when they are not watched.
    pub nodes: Option<Vec<Node>>,
}
