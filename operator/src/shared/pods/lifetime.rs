//! From a pod's start to its end.

use carryon_crds::common::PodTemplate;
use k8s_openapi::api::core::v1::{Container, HTTPGetAction, Lifecycle, LifecycleHandler, PodSpec, Probe, SleepAction};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

/// Seconds in which a server's container has to become ready: an hour for loading weights, be it in the pod or in the pool behind a gateway.
const STARTUP_SECONDS: i32 = 3600;
/// Time for the end of a pod to reach every node's Service rules.
const LINGER_SECONDS: i64 = 5;
/// Time for a server to end when its answers are cut off.
const END_SECONDS: i64 = 3;
/// Seconds between SIGTERM and SIGKILL in which answers that have begun are finished.
const DRAIN_SECONDS: i64 = 60;
/// Seconds between SIGTERM and SIGKILL in which a checkpoint is written.
const CHECKPOINT_SECONDS: i64 = 120;

/// How long a role's pod goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lifetime {
    /// It serves until it is told to end, and then until its last client has heard that its address is gone.
    Server,
    /// It ends with its work. One that hangs is ended by its job's deadline, not by a probe: a long step is no reason to lose it.
    Task,
}

/// Seconds in which a server's pod has to become ready: the startup probe's, and as many for its image and its node.
pub fn progress_deadline(template: &PodTemplate) -> i32 {
    2 * startup_seconds(template)
}

fn startup_seconds(template: &PodTemplate) -> i32 {
    template.startup_deadline_seconds.unwrap_or(STARTUP_SECONDS)
}

impl Lifetime {
    /// Seconds in which a server may finish what it has begun, where the user says how many a pod has: beside them it waits for its address to
    /// go, and ends.
    pub(super) fn drain(self, template: &PodTemplate) -> Option<i64> {
        template
            .termination_grace_period_seconds
            .filter(|_| self == Self::Server)
            .map(|grace| (grace - LINGER_SECONDS - END_SECONDS).max(1))
    }

    pub(super) fn shape(self, template: &PodTemplate, pod: &mut PodSpec, worker: &mut Container) {
        let is_server = self == Self::Server;
        let grace = if is_server { DRAIN_SECONDS } else { CHECKPOINT_SECONDS };
        pod.termination_grace_period_seconds = template.termination_grace_period_seconds.or(Some(grace));
        pod.restart_policy = Some(if is_server { "Always" } else { "Never" }.to_owned());
        if is_server {
            worker.startup_probe = Some(probe("/readyz", 1, startup_seconds(template)));
            worker.readiness_probe = Some(probe("/readyz", 5, 3));
            worker.liveness_probe = Some(probe("/healthz", 10, 6));
            let sleep = LifecycleHandler { sleep: Some(SleepAction { seconds: LINGER_SECONDS }), ..LifecycleHandler::default() };
            worker.lifecycle = Some(Lifecycle { pre_stop: Some(sleep), ..Lifecycle::default() });
        }
    }
}

/// An HTTP GET of `path` every `period` seconds, given up after `failures` in a row.
fn probe(path: &str, period: i32, failures: i32) -> Probe {
    Probe {
        http_get: Some(HTTPGetAction {
            path: Some(path.to_owned()),
            port: IntOrString::String("http".to_owned()),
            ..HTTPGetAction::default()
        }),
        period_seconds: Some(period),
        timeout_seconds: Some(5),
        failure_threshold: Some(failures),
        ..Probe::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_finishes_what_it_has_begun_in_the_time_that_its_user_gives_it() {
        let drain = |lifetime: Lifetime, seconds| {
            lifetime.drain(&PodTemplate { termination_grace_period_seconds: seconds, ..PodTemplate::default() })
        };
        assert_eq!(drain(Lifetime::Server, Some(600)), Some(592));
        assert_eq!(drain(Lifetime::Server, Some(0)), Some(1));
        assert_eq!((drain(Lifetime::Server, None), drain(Lifetime::Task, Some(600))), (None, None));
    }
}
