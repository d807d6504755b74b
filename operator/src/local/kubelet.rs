//! A small kubelet: runs the pods of the store as processes and writes their statuses.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::{ContainerPort, ContainerState, ContainerStateRunning, ContainerStateTerminated, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::ResourceExt as _;

use super::folders::Folders;
use super::last_words;
use super::pod_status::{self, Container};
use super::polls::Polls;
use super::ports::Ports;
use super::probes::{Health, Probes};
use super::process::{Register, Running};
use super::rewrite;
use super::store::{Key, Store};
use crate::shared::meta;
use crate::shared::trouble::phase;
use crate::shared::worker;

/// Back-off before the second restart; the first is at once.
const BACK_OFF: Duration = Duration::from_secs(1);
/// Longest back-off.
const BACK_OFF_LIMIT: Duration = Duration::from_secs(60);
/// A container that ran this long starts with a clean record.
const FORGIVEN: Duration = Duration::from_secs(120);

/// What runs a pod.
#[derive(Default)]
struct Slot {
    running: Option<Running>,
    started: Option<Instant>,
    probes: Probes,
    /// How it stands, as the pod's status says it.
    container: Container,
    /// The containers before it, which have done their work.
    ahead: Vec<Container>,
    /// Restarts in a row, for the back-off.
    streak: u32,
    not_before: Option<Instant>,
    /// When SIGKILL follows the SIGTERM already sent.
    kill_at: Option<Instant>,
}

impl Slot {
    /// The container whose turn it is: one of those that come before the pod's own, or that.
    fn turn<'a>(&self, pod: &'a Pod) -> Option<&'a k8s_openapi::api::core::v1::Container> {
        let spec = pod.spec.as_ref()?;
        spec.init_containers.iter().flatten().nth(self.ahead.len()).or_else(|| spec.containers.first())
    }

    /// Whether it is one of those before.
    fn is_before(&self, pod: &Pod) -> bool {
        pod.spec.as_ref().is_some_and(|spec| self.ahead.len() < spec.init_containers.iter().flatten().count())
    }
}

/// Runs pods.
pub struct Kubelet {
    folders: Folders,
    worker: PathBuf,
    ports: Ports,
    register: Register,
    slots: BTreeMap<Key, Slot>,
    /// Pods that are being stopped with the supervisor: nothing is started any more.
    stopping: bool,
}

impl Kubelet {
    /// Ends what an earlier run has left and takes over its pods: containers start anew; a pod that runs to completion is
    /// lost with its node, so its Job makes another one.
    pub fn new(folders: Folders, worker: PathBuf, store: &mut Store) -> io::Result<Self> {
        let register = Register::clean(&folders.root.join("processes.json"))?;
        let ports = Ports::open(folders.root.join("ports.json"));
        let mut slots = BTreeMap::new();
        for mut pod in store.list::<Pod>() {
            let (namespace, name) = (meta::namespace(&pod), pod.name_any());
            if runs_once(&pod) && !is_finished(&pod) {
                store.remove::<Pod>(&namespace, &name)?;
            } else if !runs_once(&pod) {
                pod.status = None;
                // Somebody else may have them by now.
                ports_of(&mut pod).for_each(|port| port.host_port = None);
                store.put(&pod)?;
            } else {
                slots.insert(Key::of::<Pod>(&namespace, &name), Slot { container: pod_status::read(&pod), ..Slot::default() });
            }
        }
        Ok(Self { folders, worker, ports, register, slots, stopping: false })
    }

    /// One round: gives ports, starts, reaps, probes, stops, and writes the statuses of all pods.
    pub fn tick(&mut self, store: &mut Store, polls: &mut Polls, now: &Time) -> io::Result<()> {
        // All ports first: a process is told the addresses of every pod of a Service.
        for mut pod in store.list::<Pod>() {
            self.give_ports(&mut pod, store)?;
        }
        for mut pod in store.list::<Pod>() {
            let key = Key::of::<Pod>(&meta::namespace(&pod), &pod.name_any());
            let mut slot = self.slots.remove(&key).unwrap_or_default();
            if pod.metadata.deletion_timestamp.is_some() && slot.running.is_none() {
                store.remove::<Pod>(&key.namespace, &key.name)?;
                polls.forget(&key.to_string());
                continue;
            }
            if slot.running.is_some() {
                self.look_after(&mut slot, &pod, &key, polls, now)?;
            } else if !is_finished(&pod) && !self.stopping {
                self.start(&mut slot, &pod, &key, store, polls, now);
            }
            pod.status = Some(pod_status::status(&pod, &slot.ahead, &slot.container, now));
            store.put(&pod)?;
            self.slots.insert(key, slot);
        }
        self.register.set(self.slots.values().filter_map(|slot| Some(slot.running.as_ref()?.record().clone())).collect())
    }

    /// Asks the pods of one component to end and starts nothing any more; the rounds that follow reap them.
    pub fn stop(&mut self, store: &Store, component: &str) {
        self.stopping = true;
        for pod in store.list::<Pod>() {
            let key = Key::of::<Pod>(&meta::namespace(&pod), &pod.name_any());
            if let Some(slot) = self.slots.get_mut(&key).filter(|_| is_of(&pod, component)) {
                terminate(slot, &pod);
            }
        }
    }

    /// Ends everything at once.
    pub fn kill_all(&mut self) {
        self.slots.values().filter_map(|slot| slot.running.as_ref()).for_each(Running::kill);
    }

    /// Processes of one component that run.
    pub fn running(&self, store: &Store, component: &str) -> usize {
        let of_component = |key: &Key| store.get::<Pod>(&key.namespace, &key.name).is_some_and(|pod| is_of(&pod, component));
        self.slots.iter().filter(|(key, slot)| slot.running.is_some() && of_component(key)).count()
    }

    fn give_ports(&mut self, pod: &mut Pod, store: &mut Store) -> io::Result<()> {
        let key = Key::of::<Pod>(&meta::namespace(pod), &pod.name_any());
        for port in ports_of(pod).filter(|port| port.host_port.is_none()) {
            port.host_port = Some(i32::from(self.ports.assign(&key.to_string(), port.container_port)?));
            port.host_ip = Some("127.0.0.1".to_owned());
        }
        store.put(pod)
    }

    fn start(&self, slot: &mut Slot, pod: &Pod, key: &Key, store: &Store, polls: &mut Polls, now: &Time) {
        if slot.not_before.is_some_and(|until| Instant::now() < until) {
            return;
        }
        let Some(container) = slot.turn(pod) else { return };
        let process = match rewrite::process(pod, container, store, &self.folders, &self.worker) {
            Ok(process) => process,
            Err(rewrite::NotYet { reason, message }) => {
                slot.container.state = pod_status::waiting(reason, Some(message));
                return;
            }
        };
        polls.forget(&key.to_string());
        match Running::start(&process) {
            Ok(running) => {
                slot.running = Some(running);
                slot.started = Some(Instant::now());
                slot.probes = Probes::default();
                slot.kill_at = None;
                slot.container.started_at = Some(now.clone());
                slot.container.state =
                    ContainerState { running: Some(ContainerStateRunning { started_at: Some(now.clone()) }), ..ContainerState::default() };
            }
            Err(error) => {
                slot.container.state = pod_status::waiting("CreateContainerError", Some(error.to_string()));
                slot.not_before = Some(Instant::now() + back_off(slot.streak));
                slot.streak += 1;
            }
        }
    }

    fn look_after(&self, slot: &mut Slot, pod: &Pod, key: &Key, polls: &mut Polls, now: &Time) -> io::Result<()> {
        let Some(running) = slot.running.as_mut() else { return Ok(()) };
        if let Some(code) = running.ended()? {
            let message = last_words::read(&self.folders, key, code);
            ended(slot, pod, code, message, now);
            return Ok(());
        }
        if slot.kill_at.is_some_and(|at| Instant::now() >= at) {
            running.kill();
        }
        if pod.metadata.deletion_timestamp.is_some() {
            terminate(slot, pod);
        } else if let Some(container) = slot.turn(pod).filter(|_| !slot.is_before(pod))
            && slot.kill_at.is_none()
            && let Health::Restart(probe) = slot.probes.tick(&key.to_string(), container, polls)
        {
            tracing::warn!(pod = %key, probe, "restarting the container: its probe has failed");
            terminate(slot, pod);
        }
        slot.container.ready = slot.probes.ready() && slot.kill_at.is_none();
        slot.container.started = slot.probes.started();
        Ok(())
    }
}

/// SIGTERM now, once; SIGKILL after the grace period.
fn terminate(slot: &mut Slot, pod: &Pod) {
    let Some(running) = slot.running.as_ref().filter(|_| slot.kill_at.is_none()) else { return };
    running.terminate();
    let grace = pod.spec.as_ref().and_then(|spec| spec.termination_grace_period_seconds).unwrap_or(30);
    slot.kill_at = Some(Instant::now() + Duration::from_secs(u64::try_from(grace).unwrap_or(0)));
}

fn ended(slot: &mut Slot, pod: &Pod, exit_code: i32, message: Option<String>, now: &Time) {
    slot.running = None;
    slot.kill_at = None;
    slot.container.ready = false;
    slot.container.started = false;
    let terminated = ContainerStateTerminated {
        exit_code,
        message,
        reason: Some(if exit_code == 0 { "Completed" } else { "Error" }.to_owned()),
        started_at: slot.container.started_at.clone(),
        finished_at: Some(now.clone()),
        ..ContainerStateTerminated::default()
    };
    let state = ContainerState { terminated: Some(terminated), ..ContainerState::default() };
    if exit_code == 0 && slot.is_before(pod) {
        slot.ahead.push(Container { state, ready: true, ..std::mem::take(&mut slot.container) });
        (slot.streak, slot.not_before) = (0, None);
        return;
    }
    if runs_once(pod) {
        slot.container.state = state;
        return;
    }
    if slot.started.is_some_and(|started| started.elapsed() > FORGIVEN) {
        slot.streak = 0;
    }
    slot.container.last = state;
    slot.container.restarts += 1;
    slot.not_before = Some(Instant::now() + back_off(slot.streak));
    slot.streak += 1;
    slot.container.state = pod_status::waiting("CrashLoopBackOff", None);
}

fn ports_of(pod: &mut Pod) -> impl Iterator<Item = &mut ContainerPort> {
    let spec = pod.spec.iter_mut();
    let containers = spec.flat_map(|spec| spec.init_containers.iter_mut().flatten().chain(&mut spec.containers));
    containers.flat_map(|container| container.ports.iter_mut().flatten())
}

/// None for the first restart in a row, then doubled each time.
fn back_off(streak: u32) -> Duration {
    match streak {
        0 => Duration::ZERO,
        _ => (BACK_OFF * 2u32.pow((streak - 1).min(10))).min(BACK_OFF_LIMIT),
    }
}

fn is_of(pod: &Pod, component: &str) -> bool {
    worker::name(pod) == Some(component)
}

fn runs_once(pod: &Pod) -> bool {
    pod.spec.as_ref().is_some_and(|spec| spec.restart_policy.as_deref() == Some("Never"))
}

fn is_finished(pod: &Pod) -> bool {
    matches!(phase(pod), "Succeeded" | "Failed")
}
