//! A container's probes, as a kubelet keeps count of them.

use std::time::Duration;

use k8s_openapi::api::core::v1::{Container, Probe};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::polls::Polls;
use super::rewrite::host_port;

/// What the probes of one container have said since it was started.
#[derive(Clone, Debug, Default)]
pub struct Probes {
    started: bool,
    ready: bool,
    failures: [i32; 3],
}

/// What to do with the container.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Health {
    /// Nothing.
    Fine,
    /// Restart it: this probe has failed too often.
    Restart(&'static str),
}

impl Probes {
    /// Whether the pod gets traffic.
    pub fn ready(&self) -> bool {
        self.ready
    }

    /// Whether the startup probe has passed.
    pub fn started(&self) -> bool {
        self.started
    }

    /// Runs the probes that are due; `name` tells the answers of this container from others'.
    pub fn tick(&mut self, name: &str, container: &Container, polls: &mut Polls) -> Health {
        if !self.started {
            let Some(probe) = &container.startup_probe else {
                self.started = true;
                return Health::Fine;
            };
            return match self.run(0, &format!("{name}/startup"), probe, container, polls) {
                Some(true) => {
                    self.started = true;
                    Health::Fine
                }
                Some(false) if self.failures[0] >= probe.failure_threshold.unwrap_or(3) => Health::Restart("startup"),
                _ => Health::Fine,
            };
        }
        match &container.readiness_probe {
            None => self.ready = true,
            Some(probe) => match self.run(1, &format!("{name}/readiness"), probe, container, polls) {
                Some(true) => self.ready = true,
                Some(false) if self.failures[1] >= probe.failure_threshold.unwrap_or(3) => self.ready = false,
                _ => {}
            },
        }
        if let Some(probe) = &container.liveness_probe
            && self.run(2, &format!("{name}/liveness"), probe, container, polls) == Some(false)
            && self.failures[2] >= probe.failure_threshold.unwrap_or(3)
        {
            return Health::Restart("liveness");
        }
        Health::Fine
    }

    fn run(&mut self, index: usize, name: &str, probe: &Probe, container: &Container, polls: &mut Polls) -> Option<bool> {
        let url = url(probe, container)?;
        let period = Duration::from_secs(u64::try_from(probe.period_seconds.unwrap_or(10)).unwrap_or(10));
        let good = polls.answer(name, &url, period)?.good;
        self.failures[index] = if good { 0 } else { self.failures[index] + 1 };
        Some(good)
    }
}

fn url(probe: &Probe, container: &Container) -> Option<String> {
    let get = probe.http_get.as_ref()?;
    let port = match &get.port {
        IntOrString::Int(port) => *port,
        IntOrString::String(name) => container.ports.iter().flatten().find(|port| port.name.as_ref() == Some(name))?.container_port,
    };
    Some(format!("http://127.0.0.1:{}{}", host_port(container, port)?, get.path.as_deref().unwrap_or("/")))
}
