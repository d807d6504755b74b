//! NetworkPolicies: who may connect to an object's pods. They do not say whom the pods may connect to: name servers, the servers of volumes,
//! proxies and what a mesh puts into pods differ between clusters, and a rule that forgets one of them stops the work. Who knows them adds a policy.

use std::str::FromStr;

use carryon_crds::names;
use k8s_openapi::api::networking::v1::{NetworkPolicy, NetworkPolicyIngressRule, NetworkPolicyPeer, NetworkPolicyPort, NetworkPolicySpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, LabelSelectorRequirement};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use serde::Deserialize;

use super::meta::Owner;

/// Who connects to pools, trainers and gateways and is none of them.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Peers {
    /// The operator's own pods.
    pub operator: NetworkPolicyPeer,
    /// Those that scrape metrics, on the one port that each pod has.
    #[serde(default)]
    pub scrapers: Vec<NetworkPolicyPeer>,
    /// Clients of gateways; everybody when none are named.
    #[serde(default)]
    pub clients: Vec<NetworkPolicyPeer>,
}

impl Peers {
    /// Who asks a pod how it is.
    pub fn watchers(&self) -> Vec<NetworkPolicyPeer> {
        [std::slice::from_ref(&self.operator), &self.scrapers].concat()
    }
}

impl FromStr for Peers {
    type Err = serde_json::Error;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        serde_json::from_str(text)
    }
}

/// Pods of these components, of whatever object, in the namespaces that `namespaces` selects; in the policy's own when there is no selector.
pub fn pods_of(components: &[&str], namespaces: Option<LabelSelector>) -> NetworkPolicyPeer {
    let component = LabelSelectorRequirement {
        key: names::COMPONENT_LABEL.to_owned(),
        operator: "In".to_owned(),
        values: Some(components.iter().map(|component| (*component).to_owned()).collect()),
    };
    let pods = LabelSelector {
        match_labels: Some([(names::NAME_LABEL.to_owned(), names::NAME.to_owned())].into()),
        match_expressions: Some(vec![component]),
    };
    NetworkPolicyPeer { namespace_selector: namespaces, pod_selector: Some(pods), ip_block: None }
}

/// Closes the pods of `owner` but for one port, which is open to `from`; to everybody when that is empty.
pub fn ingress(owner: &Owner, name: &str, port: i32, from: Vec<NetworkPolicyPeer>) -> NetworkPolicy {
    let port = NetworkPolicyPort { port: Some(IntOrString::Int(port)), protocol: Some("TCP".to_owned()), end_port: None };
    let rule = NetworkPolicyIngressRule { from: (!from.is_empty()).then_some(from), ports: Some(vec![port]) };
    NetworkPolicy {
        metadata: owner.meta(name),
        spec: Some(NetworkPolicySpec {
            pod_selector: Some(owner.label_selector()),
            policy_types: Some(vec!["Ingress".to_owned()]),
            ingress: Some(vec![rule]),
            egress: None,
        }),
    }
}
