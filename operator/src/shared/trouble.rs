//! What is wrong with pods, in the words of the scheduler, the kubelet and the worker itself.

use carryon_crds::wire::ExitCode;
use k8s_openapi::api::core::v1::{ContainerState, ContainerStateTerminated, ContainerStatus, Pod, PodCondition};
use kube::ResourceExt as _;

use super::text::{WORDS, bounded};
use super::worker;

/// Restarts after which a container that is not ready is not expected to become so by itself.
const CRASHES: i32 = 3;

/// What is wrong with one of a set of pods.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trouble {
    /// CamelCase reason.
    pub reason: &'static str,
    /// Names the pod and says what to do.
    pub message: String,
    /// Whether only a change by the user helps: the worker says so, or has crashed again and again.
    pub permanent: bool,
}

/// Looks for trouble in `pods`: the first, in the order of their names, that waiting does not cure; else the first.
pub fn find<'a>(pods: impl IntoIterator<Item = &'a Pod>) -> Option<Trouble> {
    let mut pods: Vec<&Pod> = pods.into_iter().collect();
    pods.sort_by_key(|pod| pod.name_any());
    let mut troubles: Vec<Trouble> = pods.into_iter().filter_map(of).collect();
    let first = troubles.iter().position(|trouble| trouble.permanent).unwrap_or(0);
    (!troubles.is_empty()).then(|| troubles.swap_remove(first))
}

fn of(pod: &Pod) -> Option<Trouble> {
    // One that is on its way out has no trouble of its own, unless nobody is there to end it.
    if pod.metadata.deletion_timestamp.is_some() {
        return lost(pod);
    }
    let container = || containers(pod).into_iter().find_map(|status| crashing(pod, status).or_else(|| waiting(pod, status)));
    lost(pod).or_else(container).or_else(|| unschedulable(pod))
}

/// Whether the pod's Ready condition holds.
pub fn is_ready(pod: &Pod) -> bool {
    condition(pod, "Ready").is_some_and(|condition| condition.status == "True")
}

/// The pod's phase; empty while it has none.
pub fn phase(pod: &Pod) -> &str {
    pod.status.as_ref().and_then(|status| status.phase.as_deref()).unwrap_or_default()
}

/// How the worker's container ended, this time or the time before.
pub fn last_end(pod: &Pod) -> Option<&ContainerStateTerminated> {
    worker::status(pod).and_then(end)
}

/// How a container ended, this time or the time before.
pub fn end(status: &ContainerStatus) -> Option<&ContainerStateTerminated> {
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

/// A pod's containers in the order in which their trouble counts: those that run before the worker, its own, those beside it.
fn containers(pod: &Pod) -> Vec<&ContainerStatus> {
    let Some(status) = &pod.status else { return Vec::new() };
    let (ahead, beside) = status.init_container_statuses.iter().flatten().partition::<Vec<_>, _>(|status| status.started != Some(true));
    let is_worker = |status: &&ContainerStatus| Some(status.name.as_str()) == worker::name(pod);
    let (worker, others) = status.container_statuses.iter().flatten().partition::<Vec<_>, _>(is_worker);
    [ahead, worker, others, beside].concat()
}

/// `pod a`, or `container b of pod a` when it is not the worker's.
fn thing(pod: &Pod, status: &ContainerStatus) -> String {
    let pod_name = format!("pod {}", pod.name_any());
    if Some(status.name.as_str()) == worker::name(pod) { pod_name } else { format!("container {} of {pod_name}", status.name) }
}

fn condition<'a>(pod: &'a Pod, type_: &str) -> Option<&'a PodCondition> {
    pod.status.as_ref()?.conditions.as_ref()?.iter().find(|condition| condition.type_ == type_)
}

fn crashing(pod: &Pod, status: &ContainerStatus) -> Option<Trouble> {
    if status.ready || status.restart_count == 0 {
        return None;
    }
    let end = end(status)?;
    let said = end.message.as_deref().map(last_line).filter(|line| !line.is_empty());
    let said = said.map_or_else(|| "see its log".to_owned(), |line| format!("it said: {}", bounded(line, WORDS)));
    let is_worker = Some(status.name.as_str()) == worker::name(pod);
    let refused = is_worker && [ExitCode::Data as i32, ExitCode::Configuration as i32].contains(&end.exit_code);
    let (how, restarts) = (exit_text(end.exit_code), times(status.restart_count));
    Some(Trouble {
        reason: if refused { "WorkerRefused" } else { "PodCrashing" },
        message: format!("{} ended with {how} and was restarted {restarts}; {said}", thing(pod, status)),
        permanent: refused || status.restart_count >= CRASHES,
    })
}

fn waiting(pod: &Pod, status: &ContainerStatus) -> Option<Trouble> {
    let waiting = status.state.as_ref()?.waiting.as_ref()?;
    let reason = waiting.reason.as_deref().filter(|reason| !["ContainerCreating", "PodInitializing"].contains(reason))?;
    let detail = bounded(waiting.message.as_deref().unwrap_or("no message"), WORDS);
    Some(Trouble { reason: "PodWaiting", message: format!("{} waits: {reason}: {detail}", thing(pod, status)), permanent: false })
}

/// A node that does not answer: its containers are ready by the kubelet's last word, the pod is not, by that of others.
pub fn lost(pod: &Pod) -> Option<Trouble> {
    let ready = condition(pod, "Ready").filter(|condition| condition.status == "False")?;
    // A gate that others keep, such as a load balancer's, is no matter of the node.
    if ready.reason.as_deref() == Some("ReadinessGatesNotReady") {
        return None;
    }
    let evicted = condition(pod, "DisruptionTarget").filter(|condition| condition.status == "True");
    let node = pod.spec.as_ref()?.node_name.as_deref()?;
    let all_ready = pod.status.as_ref()?.container_statuses.iter().flatten().all(|container| container.ready);
    worker::status(pod).filter(|_| all_ready)?;
    let message = bounded(evicted.unwrap_or(ready).message.as_deref().unwrap_or_default(), WORDS);
    let said = if message.is_empty() { String::new() } else { format!(" ({message})") };
    let message = format!(
        "pod {} is on node {node}, which does not answer{said}; if it will not come back, delete the Node or taint it \
         node.kubernetes.io/out-of-service, so that the pod can start elsewhere",
        pod.name_any()
    );
    Some(Trouble { reason: "NodeLost", message, permanent: false })
}

/// Names a pod that was ready since its container started and is not any more: it hangs, or is too busy to say that it does not.
pub fn silent(pods: &[Pod]) -> Option<String> {
    let was_ready = |pod: &&Pod| {
        let lost = condition(pod, "Ready").filter(|condition| condition.status == "False")?.last_transition_time.as_ref()?;
        let started = worker::status(pod)?.state.as_ref()?.running.as_ref()?.started_at.as_ref()?;
        (pod.metadata.deletion_timestamp.is_none() && lost.0 > started.0).then_some(())
    };
    let name = pods.iter().filter(|pod| was_ready(pod).is_some()).map(|pod| pod.name_any()).min()?;
    Some(format!("pod {name} was ready and no longer answers: see its log; it is restarted when that lasts"))
}

/// Whether the pod was lost to its node, to preemption or to an eviction.
pub fn is_disrupted(pod: &Pod) -> bool {
    condition(pod, "DisruptionTarget").is_some_and(|condition| condition.status == "True")
}

fn unschedulable(pod: &Pod) -> Option<Trouble> {
    let scheduled = condition(pod, "PodScheduled").filter(|condition| condition.status == "False")?;
    let message = bounded(scheduled.message.as_deref().unwrap_or_default(), WORDS);
    Some(Trouble { reason: "Unschedulable", message: format!("pod {} has no node: {message}", pod.name_any()), permanent: false })
}

/// Termination messages that fall back to logs hold many lines: the last that calls itself an error says most, else the last.
pub fn last_line(text: &str) -> &str {
    let mut lines = text.lines().rev().map(str::trim).filter(|line| !line.is_empty());
    let is_error = |line: &&str| line.starts_with("error") || line.contains(" ERROR ");
    lines.clone().find(is_error).or_else(|| lines.next()).unwrap_or_default()
}
