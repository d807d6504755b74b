//! The worker's container among those of a pod: a mesh or a cloud may put others beside it, and before it in the lists.

use carryon_crds::names;
use k8s_openapi::api::core::v1::{Container, ContainerStatus, Pod};
use kube::ResourceExt as _;

/// Name of the worker's container: the pod's component.
pub fn name(pod: &Pod) -> Option<&str> {
    pod.labels().get(names::COMPONENT_LABEL).map(String::as_str)
}

/// What the kubelet says of the worker's container.
pub fn status(pod: &Pod) -> Option<&ContainerStatus> {
    let name = name(pod)?;
    pod.status.as_ref()?.container_statuses.as_ref()?.iter().find(|status| status.name == name)
}

/// The worker's container as the pod's spec has it.
pub fn container(pod: &Pod) -> Option<&Container> {
    let name = name(pod)?;
    pod.spec.as_ref()?.containers.iter().find(|container| container.name == name)
}

/// Port of the worker's one listener.
pub fn port(pod: &Pod) -> Option<i32> {
    Some(container(pod)?.ports.as_ref()?.first()?.container_port)
}

/// What the kubelet says of the container that fetches the worker's model before it starts.
pub fn fetch_status(pod: &Pod) -> Option<&ContainerStatus> {
    pod.status.as_ref()?.init_container_statuses.as_ref()?.iter().find(|status| status.name == names::FETCH)
}

/// Whether that container runs.
pub fn fetches(pod: &Pod) -> bool {
    fetch_status(pod).is_some_and(|status| status.state.as_ref().is_some_and(|state| state.running.is_some()))
}

/// Port of its one listener.
pub fn fetch_port(pod: &Pod) -> Option<i32> {
    let mut containers = pod.spec.as_ref()?.init_containers.as_ref()?.iter();
    Some(containers.find(|container| container.name == names::FETCH)?.ports.as_ref()?.first()?.container_port)
}
