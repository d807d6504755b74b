//! The status of a pod with one container and those before it, as a kubelet writes it.

use k8s_openapi::api::core::v1::{ContainerState, ContainerStateWaiting, ContainerStatus, Pod, PodCondition, PodStatus};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

/// How a pod's container stands.
#[derive(Clone, Debug, Default)]
pub struct Container {
    /// Now.
    pub state: ContainerState,
    /// The time before.
    pub last: ContainerState,
    /// Restarts.
    pub restarts: i32,
    /// Readiness probe.
    pub ready: bool,
    /// Startup probe.
    pub started: bool,
    /// When it was started.
    pub started_at: Option<Time>,
}

/// A container that is not there yet.
pub fn waiting(reason: &str, message: Option<String>) -> ContainerState {
    let waiting = ContainerStateWaiting { reason: Some(reason.to_owned()), message };
    ContainerState { waiting: Some(waiting), ..ContainerState::default() }
}

/// The container's standing that `pod`'s stored status tells of.
pub fn read(pod: &Pod) -> Container {
    let stored = pod.status.as_ref().and_then(|status| status.container_statuses.as_ref()?.first().cloned());
    stored.map_or_else(Container::default, |stored| Container {
        state: stored.state.unwrap_or_default(),
        last: stored.last_state.unwrap_or_default(),
        restarts: stored.restart_count,
        ..Container::default()
    })
}

/// The status of `pod` with `container`, whose turn it is after those `ahead` have done their work.
pub fn status(pod: &Pod, ahead: &[Container], container: &Container, now: &Time) -> PodStatus {
    let spec = pod.spec.clone().unwrap_or_default();
    let before = spec.init_containers.unwrap_or_default();
    let idle = Container { state: waiting("PodInitializing", None), ..Container::default() };
    let turns = ahead.iter().chain([container]).chain(std::iter::repeat(&idle));
    let mut statuses: Vec<ContainerStatus> =
        before.iter().chain(spec.containers.first()).zip(turns).map(|(spec, container)| told(spec, container)).collect();
    let own = statuses.split_off(before.len().min(statuses.len()));
    let begins = ahead.len() < before.len();
    let phase = match (&container.state.terminated, &container.state.running, container.restarts) {
        _ if begins => "Pending",
        (Some(end), ..) if end.exit_code == 0 => "Succeeded",
        (Some(_), ..) => "Failed",
        (None, Some(_), _) => "Running",
        (None, None, 1..) => "Running",
        (None, None, _) => "Pending",
    };
    let previous = pod.status.as_ref();
    let ready = condition(previous, "Ready", container.ready && !begins, now);
    PodStatus {
        phase: Some(phase.to_owned()),
        start_time: previous.and_then(|status| status.start_time.clone()).or_else(|| Some(now.clone())),
        pod_ip: Some("127.0.0.1".to_owned()),
        host_ip: Some("127.0.0.1".to_owned()),
        conditions: Some(vec![
            condition(previous, "PodScheduled", true, now),
            condition(previous, "ContainersReady", container.ready && !begins, now),
            ready,
        ]),
        init_container_statuses: (!statuses.is_empty()).then_some(statuses),
        container_statuses: Some(own),
        ..PodStatus::default()
    }
}

fn told(spec: &k8s_openapi::api::core::v1::Container, container: &Container) -> ContainerStatus {
    ContainerStatus {
        name: spec.name.clone(),
        image: spec.image.clone().unwrap_or_default(),
        ready: container.ready,
        started: Some(container.started),
        restart_count: container.restarts,
        state: Some(container.state.clone()),
        last_state: Some(container.last.clone()),
        ..ContainerStatus::default()
    }
}

fn condition(previous: Option<&PodStatus>, type_: &str, holds: bool, now: &Time) -> PodCondition {
    let status = if holds { "True" } else { "False" };
    let known = previous.and_then(|previous| previous.conditions.as_ref()?.iter().find(|condition| condition.type_ == type_));
    let since = known.filter(|known| known.status == status).and_then(|known| known.last_transition_time.clone());
    PodCondition {
        type_: type_.to_owned(),
        status: status.to_owned(),
        last_transition_time: since.or_else(|| Some(now.clone())),
        ..PodCondition::default()
    }
}
