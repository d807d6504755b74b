//! The pod every role runs in: restricted, with any UID, a read-only root and no API token.

mod lifetime;
mod volumes;

use std::collections::BTreeMap;

use carryon_crds::common::{LocalReference, PodTemplate, Resources};
use carryon_crds::{names, quantity};
use k8s_openapi::api::core::v1::{
    Capabilities, Container, ContainerPort, EnvFromSource, EnvVar, LocalObjectReference, PodSecurityContext, PodSpec, PodTemplateSpec,
    ResourceClaim, ResourceRequirements, SeccompProfile, SecurityContext, VolumeMount,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

pub use self::lifetime::{Lifetime, progress_deadline};
pub use self::volumes::{Mount, MountSource, inside};
use super::Settings;
use super::meta::Owner;
use super::network_policy::Peers;
use super::revision::Rendering;

/// What the pods of an object are made from, whatever their role.
#[derive(Clone, Debug, PartialEq)]
pub struct Basis {
    /// Who they belong to.
    pub owner: Owner,
    /// The user's template, and the defaults of all.
    pub template: PodTemplate,
    /// Image when the template names none.
    pub image: String,
    /// User of the pods; none where the cluster picks one.
    pub user: Option<i64>,
    /// Who is let through to them beside their clients; none where everybody is.
    pub peers: Option<Peers>,
    /// Whether they stay what they were rendered as.
    pub rendering: Rendering,
}

impl Basis {
    /// Of the pods of `owner`, with the worker image that they were rendered with, or today's.
    pub fn new(owner: Owner, template: &PodTemplate, rendering: Rendering, settings: &Settings) -> Self {
        let image = rendering.image().unwrap_or_else(|| settings.worker_image.clone());
        let (template, user, peers) = (settings.pod_defaults.fill(template), settings.pod_user, settings.peers.clone());
        Self { owner, template, image, user, peers, rendering }
    }
}

/// What differs between the roles' pods.
pub struct Role<'a> {
    /// What does not.
    pub basis: &'a Basis,
    /// `base`, `train` or `serve`.
    pub subcommand: &'static str,
    /// Arguments beside `--config`, `--listen` and `--threads`.
    pub args: Vec<(&'static str, String)>,
    /// Environment variables, for templates that do not name them.
    pub env: Vec<EnvVar>,
    /// Port of the one listener.
    pub port: i32,
    /// Volumes beside configuration and `/tmp`. Those that are written to belong to a group of the user's number.
    pub mounts: Vec<Mount>,
    /// What runs before the worker.
    pub before: Option<Before>,
    /// How long it goes on.
    pub lifetime: Lifetime,
}

/// A container that fills some of the mounts before the worker starts.
pub struct Before {
    /// Name of the container.
    pub name: &'static str,
    /// Its image; when absent the worker's, with the environment and the volumes that the user gives the worker.
    pub image: Option<String>,
    /// What it runs.
    pub command: Vec<String>,
    /// Its arguments.
    pub args: Vec<String>,
    /// Its own environment variables, which the user's do not replace.
    pub env: Vec<EnvVar>,
    /// Secrets whose keys are environment variables.
    pub env_from: Vec<EnvFromSource>,
    /// Port of its listener, if it has one.
    pub port: Option<i32>,
    /// Names of the mounts that it writes to.
    pub writes: &'static [&'static str],
    /// Volumes that it alone has.
    pub mounts: Vec<Mount>,
}

impl Before {
    /// Whether it writes into a volume that outlives the pod, and is root's at first.
    fn writes_claim(&self, mounts: &[Mount]) -> bool {
        mounts.iter().any(|mount| self.writes.contains(&&*mount.name) && matches!(mount.source, MountSource::Claim(_)))
    }
}

/// The pod template of a role.
pub fn template(role: &Role<'_>) -> PodTemplateSpec {
    let Basis { owner, template, user, .. } = role.basis;
    let scheduling = template.scheduling.clone();
    let before = role.before.as_ref();
    let writes = role.mounts.iter().any(|mount| !mount.read_only) || before.is_some_and(|before| before.writes_claim(&role.mounts));
    let own = before.map_or(&[][..], |before| &before.mounts);
    let all: Vec<&Mount> = role.mounts.iter().chain(own).collect();
    let (volumes, mounts) = volumes::volumes(&all);
    let (extra, mounts) = mounts.into_iter().partition::<Vec<_>, _>(|mount| own.iter().any(|own| own.path == mount.mount_path));
    let before = before.map(|before| vec![container_before(before, role, extra)]);
    let mut worker = worker(role, mounts);
    let mut pod = PodSpec {
        affinity: scheduling.affinity,
        node_selector: (!scheduling.node_selector.is_empty()).then_some(scheduling.node_selector),
        tolerations: filled(scheduling.tolerations),
        topology_spread_constraints: filled(scheduling.topology_spread_constraints),
        priority_class_name: scheduling.priority_class_name,
        runtime_class_name: scheduling.runtime_class_name,
        resource_claims: filled(scheduling.resource_claims),
        image_pull_secrets: filled(template.image_pull_secrets.iter().map(pull_secret).collect()),
        automount_service_account_token: Some(false),
        enable_service_links: Some(false),
        security_context: Some(pod_security(*user, writes)),
        service_account_name: template.service_account_name.clone(),
        volumes: Some([volumes, template.volumes.clone()].concat()),
        init_containers: before,
        ..PodSpec::default()
    };
    role.lifetime.shape(template, &mut pod, &mut worker);
    pod.containers = vec![worker];
    // The operator's own count where both name one.
    let labels = template.labels.clone().into_iter().chain(names::labels(owner.component, &owner.name)).collect();
    let annotations = (!template.annotations.is_empty()).then(|| template.annotations.clone());
    PodTemplateSpec { metadata: Some(ObjectMeta { labels: Some(labels), annotations, ..ObjectMeta::default() }), spec: Some(pod) }
}

fn worker(role: &Role<'_>, mounts: Vec<VolumeMount>) -> Container {
    let Basis { owner, template, image, .. } = role.basis;
    let mut args = vec![role.subcommand.to_owned()];
    let mut argument = |name: &str, value: String| args.extend([name.to_owned(), value]);
    argument("--config", format!("{}/{}", names::CONFIG_DIR, names::CONFIG_FILE));
    argument("--listen", format!("0.0.0.0:{}", role.port));
    role.args.iter().for_each(|(name, value)| argument(name, value.clone()));
    role.lifetime.drain(template).into_iter().for_each(|seconds| argument("--drain-seconds", seconds.to_string()));
    threads(&template.resources).into_iter().for_each(|count| argument("--threads", count.to_string()));
    let unnamed = role.env.iter().filter(|own| template.env.iter().all(|named| named.name != own.name));
    Container {
        name: owner.component.to_owned(),
        image: template.image.clone().or_else(|| Some(image.clone())),
        command: Some(vec![names::WORKER.to_owned()]),
        args: Some(args),
        ports: Some(vec![http_port(role.port)]),
        resources: resources(template),
        security_context: Some(container_security()),
        termination_message_path: Some(names::TERMINATION_LOG.to_owned()),
        termination_message_policy: Some("FallbackToLogsOnError".to_owned()),
        volume_mounts: Some([mounts, template.volume_mounts.clone()].concat()),
        env: filled(unnamed.chain(&template.env).cloned().collect()),
        ..Container::default()
    }
}

fn container_before(before: &Before, role: &Role<'_>, extra: Vec<VolumeMount>) -> Container {
    let Basis { template, image, .. } = role.basis;
    let written = role.mounts.iter().filter(|mount| before.writes.contains(&&*mount.name));
    let written = written.map(|mount| volumes::mount(&mount.name, &mount.path, false));
    let (mut mounts, mut env): (Vec<VolumeMount>, Vec<EnvVar>) = (written.chain(extra).collect(), before.env.clone());
    if before.image.is_none() {
        mounts.extend(template.volume_mounts.iter().cloned());
        env.extend(template.env.iter().filter(|named| before.env.iter().all(|own| own.name != named.name)).cloned());
    }
    let worker_image = template.image.as_ref().unwrap_or(image);
    Container {
        name: before.name.to_owned(),
        image: Some(before.image.as_ref().unwrap_or(worker_image).clone()),
        command: Some(before.command.clone()),
        args: filled(before.args.clone()),
        env: filled(env),
        env_from: filled(before.env_from.clone()),
        ports: before.port.map(|port| vec![http_port(port)]),
        // As much as the worker's: it costs nothing, and quotas ask for some.
        resources: resources(template),
        security_context: Some(container_security()),
        termination_message_policy: Some("FallbackToLogsOnError".to_owned()),
        volume_mounts: Some(mounts),
        ..Container::default()
    }
}

fn http_port(port: i32) -> ContainerPort {
    ContainerPort { name: Some("http".to_owned()), container_port: port, protocol: Some("TCP".to_owned()), ..ContainerPort::default() }
}

/// Threads of the worker: `limits.cpu` rounded up, so that a quota is not shared by as many threads as the node has cores.
fn threads(resources: &Resources) -> Option<u64> {
    let cores = quantity::value(&resources.limits.get("cpu")?.0)?;
    (cores > 0.0).then(|| (cores.ceil() as u64).clamp(1, 4096))
}

fn resources(template: &PodTemplate) -> Option<ResourceRequirements> {
    let map = |map: &BTreeMap<_, _>| (!map.is_empty()).then(|| map.clone());
    let claims = template.scheduling.resource_claims.iter().map(|claim| ResourceClaim { name: claim.name.clone(), request: None });
    let requirements = ResourceRequirements {
        requests: map(&template.resources.requests),
        limits: map(&template.resources.limits),
        claims: filled(claims.collect()),
    };
    (requirements != ResourceRequirements::default()).then_some(requirements)
}

fn filled<T>(list: Vec<T>) -> Option<Vec<T>> {
    (!list.is_empty()).then_some(list)
}

fn pull_secret(secret: &LocalReference) -> LocalObjectReference {
    LocalObjectReference { name: secret.name.clone() }
}

/// The user is named because the image of a model may name none, or root. Its group is the image's: what is made for any user is for group 0.
fn pod_security(user: Option<i64>, writes: bool) -> PodSecurityContext {
    let fs_group = user.filter(|_| writes);
    PodSecurityContext {
        run_as_non_root: Some(true),
        run_as_user: user,
        fs_group,
        fs_group_change_policy: fs_group.map(|_| "OnRootMismatch".to_owned()),
        seccomp_profile: Some(SeccompProfile { type_: "RuntimeDefault".to_owned(), localhost_profile: None }),
        ..PodSecurityContext::default()
    }
}

fn container_security() -> SecurityContext {
    SecurityContext {
        allow_privilege_escalation: Some(false),
        read_only_root_filesystem: Some(true),
        capabilities: Some(Capabilities { drop: Some(vec!["ALL".to_owned()]), add: None }),
        ..SecurityContext::default()
    }
}
