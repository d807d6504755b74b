//! Metadata of children: names, labels, owners; the Services and disruption budgets of their pods.

use std::collections::BTreeMap;

use carryon_crds::names;
use k8s_openapi::api::core::v1::{Service, ServicePort, ServiceSpec};
use k8s_openapi::api::policy::v1::{PodDisruptionBudget, PodDisruptionBudgetSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta, OwnerReference};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::{Resource, ResourceExt as _};

use super::Refusal;

/// Who a child belongs to and what it is part of.
#[derive(Clone, Debug, PartialEq)]
pub struct Owner {
    /// Name of the object.
    pub name: String,
    /// Its namespace.
    pub namespace: String,
    /// `pool`, `trainer` or `gateway`.
    pub component: &'static str,
    /// Controller reference to the object; absent while it has no uid.
    reference: Option<OwnerReference>,
}

impl Owner {
    /// The owner of the children of `object`.
    pub fn of<K: Resource<DynamicType = ()>>(object: &K, component: &'static str) -> Self {
        Self { name: object.name_any(), namespace: namespace(object), component, reference: object.controller_owner_ref(&()) }
    }

    /// That what `field` names is not there yet, in the owner's namespace.
    pub fn lacks(&self, reason: &'static str, kind: &str, name: &str, field: &str) -> Refusal {
        Refusal::waiting(reason, format!("{kind} {}/{name} ({field}) not found: create it", self.namespace))
    }

    /// Metadata of a child called `name`.
    pub fn meta(&self, name: impl Into<String>) -> ObjectMeta {
        ObjectMeta {
            name: Some(name.into()),
            namespace: Some(self.namespace.clone()),
            labels: Some(names::labels(self.component, &self.name)),
            owner_references: self.reference.clone().map(|reference| vec![reference]),
            ..ObjectMeta::default()
        }
    }

    /// Whether an object is ours to keep or to remove: no other has a controller of its own.
    pub fn controls<K: Resource>(&self, object: &K) -> bool {
        let controller = object.owner_references().iter().find(|owner| owner.controller == Some(true));
        controller.is_none_or(|controller| self.reference.as_ref().is_some_and(|reference| reference.uid == controller.uid))
    }

    /// Labels that select the pods.
    pub fn selector(&self) -> BTreeMap<String, String> {
        names::selector(self.component, &self.name)
    }

    /// The same as a label selector of a workload.
    pub fn label_selector(&self) -> LabelSelector {
        LabelSelector { match_labels: Some(self.selector()), match_expressions: None }
    }

    /// The same as `key=value,…`, for the scale subresource.
    pub fn selector_text(&self) -> String {
        self.selector().iter().map(|(key, value)| format!("{key}={value}")).collect::<Vec<_>>().join(",")
    }
}

/// Namespace of an object; `default` while it has none.
pub fn namespace<K: Resource>(object: &K) -> String {
    object.namespace().unwrap_or_else(|| "default".to_owned())
}

/// A Service over the owner's pods; `headless` gives each pod its own address.
pub fn service(owner: &Owner, name: &str, port: i32, headless: bool) -> Service {
    Service {
        metadata: owner.meta(name),
        spec: Some(ServiceSpec {
            cluster_ip: headless.then(|| "None".to_owned()),
            selector: Some(owner.selector()),
            ports: Some(vec![ServicePort {
                name: Some("http".to_owned()),
                port,
                target_port: Some(IntOrString::String("http".to_owned())),
                protocol: Some("TCP".to_owned()),
                ..ServicePort::default()
            }]),
            ..ServiceSpec::default()
        }),
        status: None,
    }
}

/// One pod of the owner's may be evicted at a time.
pub fn disruption_budget(owner: &Owner, name: &str) -> PodDisruptionBudget {
    PodDisruptionBudget {
        metadata: owner.meta(name),
        spec: Some(PodDisruptionBudgetSpec {
            max_unavailable: Some(IntOrString::Int(1)),
            // A pod that serves nobody keeps no node from being drained.
            unhealthy_pod_eviction_policy: Some("AlwaysAllow".to_owned()),
            selector: Some(owner.label_selector()),
            ..PodDisruptionBudgetSpec::default()
        }),
        status: None,
    }
}
