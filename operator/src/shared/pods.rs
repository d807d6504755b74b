//! The pod every role runs in: restricted, with any UID, a read-only root and no API token.

use std::collections::BTreeMap;

use carryon_crds::common::{LocalReference, PodTemplate, Resources};
use carryon_crds::deployment::SecretKey;
use carryon_crds::names;
use k8s_openapi::api::core::v1::{
    Capabilities, ConfigMapVolumeSource, Container, ContainerPort, EmptyDirVolumeSource, HTTPGetAction, ImageVolumeSource, KeyToPath,
    Lifecycle, LifecycleHandler, LocalObjectReference, PersistentVolumeClaimVolumeSource, PodSecurityContext, PodSpec, PodTemplateSpec,
    Probe, ResourceClaim, ResourceRequirements, SeccompProfile, SecretVolumeSource, SecurityContext, SleepAction, Volume, VolumeMount,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::meta::Owner;
use super::quantity;

/// Mode of a mounted Secret's files, which are root's: the pod's container may have any UID and group, and nobody else sees them.
const SECRET_MODE: i32 = 0o444;
/// Time for the end of a pod to reach every node's Service rules.
pub const LINGER_SECONDS: i64 = 5;

/// What differs between the roles' pods.
pub struct Role<'a> {
    /// Who the pod belongs to.
    pub owner: &'a Owner,
    /// The user's template.
    pub template: &'a PodTemplate,
    /// Image when the template names none.
    pub image: &'a str,
    /// `base`, `train` or `serve`.
    pub subcommand: &'static str,
    /// Arguments beside `--config`, `--listen` and `--threads`.
    pub args: Vec<(&'static str, String)>,
    /// Port of the one listener.
    pub port: i32,
    /// Volumes beside configuration and `/tmp`.
    pub mounts: Vec<Mount>,
    /// What runs before the worker.
    pub before: Option<Before>,
    /// Seconds between SIGTERM and SIGKILL.
    pub grace_seconds: i64,
    /// Startup, readiness and liveness probes.
    pub probes: Probes,
    /// Seconds the container goes on as before once its pod is to end: until the last client has heard that its address is gone.
    pub linger_seconds: Option<i64>,
    /// User of the pod; none where the cluster picks one.
    pub user: Option<i64>,
    /// Whether it writes to volumes: they then belong to a group of the user's number.
    pub writes: bool,
    /// `Always` or `Never`.
    pub restart_policy: &'static str,
}

/// A volume and where it is mounted.
pub struct Mount {
    /// Name of the volume.
    pub name: &'static str,
    /// Path in the container.
    pub path: &'static str,
    /// Where the files come from.
    pub source: MountSource,
    /// Whether the container may not write.
    pub read_only: bool,
}

/// Where a volume's files come from.
pub enum MountSource {
    /// A PersistentVolumeClaim.
    Claim(String),
    /// A ConfigMap.
    ConfigMap(String),
    /// One key of a Secret: a file of that name.
    Secret(SecretKey),
    /// An image.
    Image(String),
    /// Nowhere: it is empty at first.
    Empty,
}

/// A container that fills one of the mounts before the worker starts.
pub struct Before {
    /// Name of the container.
    pub name: &'static str,
    /// Its image.
    pub image: String,
    /// What it runs.
    pub command: Vec<String>,
    /// Name of the mount that it writes to.
    pub mount: &'static str,
}

/// Probes of a role.
#[derive(Default)]
pub struct Probes {
    /// Until it passes, the others wait.
    pub startup: Option<Probe>,
    /// Whether the pod gets traffic.
    pub readiness: Option<Probe>,
    /// Whether the container is restarted.
    pub liveness: Option<Probe>,
}

/// An HTTP GET of `path` every `period` seconds, given up after `failures` in a row.
pub fn http_probe(path: &str, period: i32, failures: i32) -> Probe {
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

/// `path` inside a volume mounted at `mount`.
pub fn inside(mount: &str, path: Option<&str>) -> String {
    match path.map(|path| path.trim_matches('/')).filter(|path| !path.is_empty()) {
        Some(path) => format!("{mount}/{path}"),
        None => mount.to_owned(),
    }
}

/// The pod template of a role.
pub fn template(role: Role<'_>) -> PodTemplateSpec {
    let mut volumes = vec![
        // The revision of which the template becomes a part knows its name.
        Volume { name: names::CONFIG_VOLUME.to_owned(), config_map: Some(config_map_volume("")), ..Volume::default() },
        Volume { name: "tmp".to_owned(), empty_dir: Some(EmptyDirVolumeSource::default()), ..Volume::default() },
    ];
    let mut mounts = vec![mount(names::CONFIG_VOLUME, names::CONFIG_DIR, true), mount("tmp", "/tmp", false)];
    for Mount { name, path, source, read_only } in &role.mounts {
        let volume = volume(name, source);
        // A kubelet does not mount one claim twice into a pod: two paths of it share the volume.
        let same = volumes
            .iter()
            .find(|other| volume.persistent_volume_claim.is_some() && other.persistent_volume_claim == volume.persistent_volume_claim);
        let name = same.map_or(*name, |other| other.name.as_str()).to_owned();
        if same.is_none() {
            volumes.push(volume);
        }
        mounts.push(mount(&name, path, *read_only));
    }
    let before = role.before.as_ref().map(|before| {
        let target = role.mounts.iter().find(|target| target.name == before.mount);
        vec![Container {
            name: before.name.to_owned(),
            image: Some(before.image.clone()),
            command: Some(before.command.clone()),
            // As much as the worker's: it costs nothing, and quotas ask for some.
            resources: resources(role.template),
            security_context: Some(container_security()),
            termination_message_policy: Some("FallbackToLogsOnError".to_owned()),
            volume_mounts: target.map(|target| vec![mount(target.name, target.path, false)]),
            ..Container::default()
        }]
    });
    let scheduling = role.template.scheduling.clone();
    PodTemplateSpec {
        metadata: Some(ObjectMeta { labels: Some(names::labels(role.owner.component, &role.owner.name)), ..ObjectMeta::default() }),
        spec: Some(PodSpec {
            affinity: scheduling.affinity,
            node_selector: (!scheduling.node_selector.is_empty()).then_some(scheduling.node_selector),
            tolerations: filled(scheduling.tolerations),
            topology_spread_constraints: filled(scheduling.topology_spread_constraints),
            priority_class_name: scheduling.priority_class_name,
            runtime_class_name: scheduling.runtime_class_name,
            resource_claims: filled(scheduling.resource_claims),
            image_pull_secrets: filled(role.template.image_pull_secrets.iter().map(pull_secret).collect()),
            automount_service_account_token: Some(false),
            enable_service_links: Some(false),
            security_context: Some(pod_security(role.user, role.writes)),
            termination_grace_period_seconds: Some(role.grace_seconds),
            restart_policy: Some(role.restart_policy.to_owned()),
            volumes: Some(volumes),
            init_containers: before,
            containers: vec![container(role, mounts)],
            ..PodSpec::default()
        }),
    }
}

fn container(role: Role<'_>, mounts: Vec<VolumeMount>) -> Container {
    let mut args = vec![role.subcommand.to_owned()];
    let mut argument = |name: &str, value: String| args.extend([name.to_owned(), value]);
    argument("--config", format!("{}/{}", names::CONFIG_DIR, names::CONFIG_FILE));
    argument("--listen", format!("0.0.0.0:{}", role.port));
    role.args.into_iter().for_each(|(name, value)| argument(name, value));
    threads(&role.template.resources).into_iter().for_each(|count| argument("--threads", count.to_string()));
    Container {
        name: role.owner.component.to_owned(),
        image: Some(role.template.image.clone().unwrap_or_else(|| role.image.to_owned())),
        command: Some(vec![names::WORKER.to_owned()]),
        args: Some(args),
        ports: Some(vec![ContainerPort {
            name: Some("http".to_owned()),
            container_port: role.port,
            protocol: Some("TCP".to_owned()),
            ..ContainerPort::default()
        }]),
        resources: resources(role.template),
        security_context: Some(container_security()),
        startup_probe: role.probes.startup,
        readiness_probe: role.probes.readiness,
        liveness_probe: role.probes.liveness,
        lifecycle: role.linger_seconds.map(linger),
        termination_message_path: Some(names::TERMINATION_LOG.to_owned()),
        termination_message_policy: Some("FallbackToLogsOnError".to_owned()),
        volume_mounts: Some(mounts),
        ..Container::default()
    }
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

fn linger(seconds: i64) -> Lifecycle {
    let sleep = LifecycleHandler { sleep: Some(SleepAction { seconds }), ..LifecycleHandler::default() };
    Lifecycle { pre_stop: Some(sleep), ..Lifecycle::default() }
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

fn mount(name: &str, path: &str, read_only: bool) -> VolumeMount {
    VolumeMount { name: name.to_owned(), mount_path: path.to_owned(), read_only: read_only.then_some(true), ..VolumeMount::default() }
}

fn volume(name: &str, source: &MountSource) -> Volume {
    let name = name.to_owned();
    match source {
        MountSource::Claim(claim) => Volume {
            name,
            persistent_volume_claim: Some(PersistentVolumeClaimVolumeSource { claim_name: claim.clone(), read_only: None }),
            ..Volume::default()
        },
        MountSource::ConfigMap(config_map) => Volume { name, config_map: Some(config_map_volume(config_map)), ..Volume::default() },
        MountSource::Secret(secret) => {
            let key = KeyToPath { key: secret.key.clone(), path: secret.key.clone(), mode: None };
            let (secret_name, default_mode) = (Some(secret.name.clone()), Some(SECRET_MODE));
            let secret = SecretVolumeSource { secret_name, items: Some(vec![key]), default_mode, optional: None };
            Volume { name, secret: Some(secret), ..Volume::default() }
        }
        MountSource::Image(reference) => {
            let image = ImageVolumeSource { reference: Some(reference.clone()), pull_policy: None };
            Volume { name, image: Some(image), ..Volume::default() }
        }
        MountSource::Empty => Volume { name, empty_dir: Some(EmptyDirVolumeSource::default()), ..Volume::default() },
    }
}

fn config_map_volume(name: &str) -> ConfigMapVolumeSource {
    ConfigMapVolumeSource { name: name.to_owned(), ..ConfigMapVolumeSource::default() }
}
