//! Whether any node, were it empty, could hold a pod: said, never acted upon, because an autoscaler may bring a larger one.

use std::collections::BTreeMap;

use carryon_crds::common::PodTemplate;
use carryon_crds::quantity;
use k8s_openapi::api::core::v1::Node;
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use kube::ResourceExt as _;

/// Nodes named in the message; the others are counted.
const NAMED: usize = 3;

/// Why no node could hold a pod of `template`, with the figures; none when one could, or when it asks for nothing.
///
/// Compares what the pod requests with what each node with the labels of the selector has to give, whatever runs there. Taints and
/// affinity are left to the scheduler.
pub fn shortage(template: &PodTemplate, nodes: &[Node]) -> Option<String> {
    let wanted = requests(template);
    let selector = &template.scheduling.node_selector;
    if wanted.is_empty() && selector.is_empty() {
        return None;
    }
    let allowed: Vec<&Node> =
        nodes.iter().filter(|node| selector.iter().all(|(key, value)| node.labels().get(key) == Some(value))).collect();
    if allowed.is_empty() {
        let labels: Vec<String> = selector.iter().map(|(key, value)| format!("{key}={value}")).collect();
        let labels = if labels.is_empty() { String::new() } else { format!(" with {}", labels.join(", ")) };
        return Some(format!("there is no node{labels}: the cluster has {}", nodes.len()));
    }
    let mut short: Vec<(String, Vec<String>)> = allowed.iter().map(|node| (node.name_any(), lacks(node, &wanted))).collect();
    if short.iter().any(|(_, lacks)| lacks.is_empty()) {
        return None;
    }
    short.sort_by_key(|(name, lacks)| (lacks.len(), name.clone()));
    let named: Vec<String> = short.iter().take(NAMED).map(|(name, lacks)| format!("{name} has {}", lacks.join(", "))).collect();
    let others = short.len().saturating_sub(NAMED);
    let others = if others == 0 { String::new() } else { format!("; so it is with {others} more") };
    Some(format!("no node is large enough for a pod: {}{others}", named.join("; ")))
}

/// What a pod asks for: as in Kubernetes, a limit is a request too where none is named.
fn requests(template: &PodTemplate) -> BTreeMap<&str, &Quantity> {
    let all = template.resources.limits.iter().chain(&template.resources.requests);
    all.map(|(resource, quantity)| (resource.as_str(), quantity)).collect()
}

/// `0 of 2 nvidia.com/gpu` for each resource of which the node has too little.
fn lacks(node: &Node, wanted: &BTreeMap<&str, &Quantity>) -> Vec<String> {
    let allocatable = node.status.as_ref().and_then(|status| status.allocatable.as_ref());
    let lacking = |(resource, wanted): (&&str, &&Quantity)| {
        let has = allocatable.and_then(|allocatable| allocatable.get(*resource)).map_or("0", |has| has.0.as_str());
        let enough = quantity::value(has).zip(quantity::value(&wanted.0)).is_none_or(|(has, wanted)| has >= wanted);
        (!enough).then(|| format!("{has} of {} {resource}", wanted.0))
    };
    wanted.iter().filter_map(lacking).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn node(name: &str, gpus: u32, memory: &str) -> Node {
        let allocatable = json!({ "cpu": "8", "memory": memory, "nvidia.com/gpu": gpus.to_string() });
        let node = json!({ "metadata": { "name": name, "labels": { "zone": name } }, "status": { "allocatable": allocatable } });
        serde_json::from_value(node).unwrap()
    }

    fn template(value: serde_json::Value) -> PodTemplate {
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn the_figures_are_those_of_single_nodes() {
        let nodes = [node("a", 2, "32Gi"), node("b", 8, "16Gi")];
        let asks = |gpus: &str, memory: &str| {
            template(json!({ "resources": { "limits": { "nvidia.com/gpu": gpus }, "requests": { "memory": memory } } }))
        };
        assert_eq!(shortage(&asks("2", "20Gi"), &nodes), None);
        assert_eq!(shortage(&asks("8", "16384Mi"), &nodes), None);
        let message = shortage(&asks("4", "20Gi"), &nodes).unwrap();
        assert_eq!(message, "no node is large enough for a pod: a has 2 of 4 nvidia.com/gpu; b has 16Gi of 20Gi memory");
        let many: Vec<Node> = ["a", "b", "c", "d", "e"].map(|name| node(name, 0, "1Gi")).into();
        let message = shortage(&asks("1", "1Gi"), &many).unwrap();
        assert!(message.ends_with("c has 0 of 1 nvidia.com/gpu; so it is with 2 more"), "{message}");
    }

    #[test]
    fn nodes_that_the_selector_leaves_out_do_not_count() {
        let nodes = [node("a", 2, "32Gi"), node("b", 8, "16Gi")];
        let pinned = |zone: &str| {
            let resources = json!({ "limits": { "nvidia.com/gpu": "4" } });
            template(json!({ "resources": resources, "scheduling": { "nodeSelector": { "zone": zone } } }))
        };
        assert_eq!(shortage(&pinned("b"), &nodes), None);
        assert_eq!(shortage(&pinned("a"), &nodes).unwrap(), "no node is large enough for a pod: a has 2 of 4 nvidia.com/gpu");
        assert_eq!(shortage(&pinned("c"), &nodes).unwrap(), "there is no node with zone=c: the cluster has 2");
        assert_eq!(shortage(&template(json!({})), &[]), None, "it asks for nothing");
    }
}
