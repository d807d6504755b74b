//! What is wrong with pods, in the words of the scheduler, the kubelet and the worker itself.

use carryon_crds::wire::ExitCode;
use k8s_openapi::api::core::v1::{ContainerState, ContainerStateTerminated, ContainerStatus, Pod};
use kube::ResourceExt as _;

/// The first thing wrong with a set of pods, in the order of their names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trouble {
    /// CamelCase reason.
    pub reason: &'static str,
    /// Names the pod and says what to do.
    pub message: String,
    /// Whether the worker itself says that only another configuration or other data help.
    pub permanent: bool,
}

/// Looks for trouble in `pods`.
pub fn find(pods: &[Pod]) -> Option<Trouble> {
    let mut pods: Vec<&Pod> = pods.iter().collect();
    pods.sort_by_key(|pod| pod.name_any());
    pods.into_iter().find_map(|pod| lost(pod).or_else(|| crashing(pod)).or_else(|| waiting(pod)).or_else(|| unschedulable(pod)))
}

/// Whether the pod's Ready condition holds.
pub fn is_ready(pod: &Pod) -> bool {
    condition(pod, "Ready").is_some_and(|(status, _)| status == "True")
}

/// The pod's phase; empty while it has none.
pub fn phase(pod: &Pod) -> &str {
    pod.status.as_ref().and_then(|status| status.phase.as_deref()).unwrap_or_default()
}

/// How the worker's container ended, this time or the time before.
pub fn last_end(pod: &Pod) -> Option<&ContainerStateTerminated> {
    container(pod).and_then(end)
}

fn end(status: &ContainerStatus) -> Option<&ContainerStateTerminated> {
    let ended = |state: &'_ Option<ContainerState>| state.as_ref().is_some_and(|state| state.terminated.is_some());
    if ended(&status.state) { status.state.as_ref()?.terminated.as_ref() } else { status.last_state.as_ref()?.terminated.as_ref() }
}

/// `exit code 1` or `signal 9`, as shells count them.
pub fn exit_text(code: i32) -> String {
    match code {
        129..=192 => format!("signal {}", code - 128),
        _ => format!("exit code {code}"),
    }
}

fn times(count: i32) -> String {
    if count == 1 { "once".to_owned() } else { format!("{count} times") }
}

/// The worker's container.
pub fn container(pod: &Pod) -> Option<&ContainerStatus> {
    pod.status.as_ref()?.container_statuses.as_ref()?.first()
}

/// The container that the pod is at, and what to call it: one that runs before the worker until it is done, then the worker's.
fn current(pod: &Pod) -> Option<(&ContainerStatus, String)> {
    let before = pod.status.as_ref()?.init_container_statuses.iter().flatten().find(|status| !status.ready);
    match before {
        Some(before) => Some((before, format!("container {} of pod {}", before.name, pod.name_any()))),
        None => Some((container(pod)?, format!("pod {}", pod.name_any()))),
    }
}

fn condition<'a>(pod: &'a Pod, type_: &str) -> Option<(&'a str, &'a str)> {
    let conditions = pod.status.as_ref()?.conditions.as_ref()?;
    let condition = conditions.iter().find(|condition| condition.type_ == type_)?;
    Some((condition.status.as_str(), condition.message.as_deref().unwrap_or_default()))
}

fn crashing(pod: &Pod) -> Option<Trouble> {
    let (status, name) = current(pod)?;
    if status.ready || status.restart_count == 0 {
        return None;
    }
    let end = end(status)?;
    let said = end.message.as_deref().map(last_line).filter(|line| !line.is_empty());
    let said = said.map_or_else(|| "see its log".to_owned(), |line| format!("it said: {line}"));
    let permanent = [ExitCode::Data as i32, ExitCode::Configuration as i32].contains(&end.exit_code);
    Some(Trouble {
        reason: if permanent { "WorkerRefused" } else { "PodCrashing" },
        message: format!("{name} ended with {} and was restarted {}; {said}", exit_text(end.exit_code), times(status.restart_count)),
        permanent,
    })
}

fn waiting(pod: &Pod) -> Option<Trouble> {
    let (status, name) = current(pod)?;
    let waiting = status.state.as_ref()?.waiting.as_ref()?;
    let reason = waiting.reason.as_deref().filter(|reason| !["ContainerCreating", "PodInitializing"].contains(reason))?;
    let detail = waiting.message.as_deref().unwrap_or("no message");
    Some(Trouble { reason: "PodWaiting", message: format!("{name} waits: {reason}: {detail}"), permanent: false })
}

/// A node that does not answer: its container is ready by the kubelet's last word, the pod is not, by that of others.
pub fn lost(pod: &Pod) -> Option<Trouble> {
    let (_, message) = condition(pod, "Ready").filter(|(status, _)| *status == "False")?;
    let evicted = condition(pod, "DisruptionTarget").filter(|(status, _)| *status == "True").map(|(_, message)| message);
    let node = pod.spec.as_ref()?.node_name.as_deref()?;
    container(pod).filter(|container| container.ready)?;
    let message = evicted.unwrap_or(message);
    let said = if message.is_empty() { String::new() } else { format!(" ({message})") };
    let message = format!(
        "pod {} is on node {node}, which does not answer{said}; if it will not come back, delete the Node or taint it \
         node.kubernetes.io/out-of-service, so that the pod can start elsewhere",
        pod.name_any()
    );
    Some(Trouble { reason: "NodeLost", message, permanent: false })
}

/// Whether the pod was lost to its node, to preemption or to an eviction.
pub fn is_disrupted(pod: &Pod) -> bool {
    condition(pod, "DisruptionTarget").is_some_and(|(status, _)| status == "True")
}

fn unschedulable(pod: &Pod) -> Option<Trouble> {
    let (_, message) = condition(pod, "PodScheduled").filter(|(status, _)| *status == "False")?;
    Some(Trouble { reason: "Unschedulable", message: format!("pod {} has no node: {message}", pod.name_any()), permanent: false })
}

/// Termination messages that fall back to logs hold many lines: the last that calls itself an error says most, else the last.
pub fn last_line(text: &str) -> &str {
    let mut lines = text.lines().rev().map(str::trim).filter(|line| !line.is_empty());
    let is_error = |line: &&str| line.starts_with("error") || line.contains(" ERROR ");
    lines.clone().find(is_error).or_else(|| lines.next()).unwrap_or_default()
}
