//! From a pod's container to a process on this machine: mount paths become folders, listeners move to the loopback
//! interface, Service names become the addresses of the pods behind them.

use std::fs;
use std::path::{Path, PathBuf};

use carryon_crds::names;
use carryon_crds::quantity::Bytes;
use k8s_openapi::api::core::v1::{Container, EnvVar, Pod, Service, Volume};
use kube::ResourceExt as _;

use super::folders::Folders;
use super::store::Store;
use crate::shared::meta;

/// A process to start.
#[derive(Clone, Debug, PartialEq)]
pub struct Process {
    /// Program.
    pub program: PathBuf,
    /// Its arguments.
    pub args: Vec<String>,
    /// Its environment variables, beside the standard ones.
    pub env: Vec<(String, String)>,
    /// Variables of this process that it gets too, unless `env` names them.
    pub inherited: &'static [&'static str],
    /// Working folder.
    pub folder: PathBuf,
    /// File that stdout and stderr are appended to.
    pub log: PathBuf,
    /// File of its last words.
    pub termination_log: PathBuf,
}

/// What a fetch takes from whoever started local mode: tokens and credentials, and the way into the network.
const OF_FETCHES: &[&str] = &[
    "HF_TOKEN",
    "HF_ENDPOINT",
    "HTTPS_PROXY",
    "https_proxy",
    "ALL_PROXY",
    "all_proxy",
    "NO_PROXY",
    "no_proxy",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_ENDPOINT_URL",
    "GOOGLE_APPLICATION_CREDENTIALS",
    "GOOGLE_SERVICE_ACCOUNT_KEY",
    "AZURE_STORAGE_ACCOUNT_NAME",
    "AZURE_STORAGE_ACCOUNT_KEY",
    "AZURE_STORAGE_SAS_TOKEN",
];

/// Why a container cannot be started now, in the kubelet's words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NotYet {
    /// CamelCase.
    pub reason: &'static str,
    /// One sentence.
    pub message: String,
}

impl NotYet {
    fn creating(message: impl Into<String>) -> Self {
        Self { reason: "ContainerCreating", message: message.into() }
    }
}

/// The process of `container` of `pod`.
pub fn process(pod: &Pod, container: &Container, store: &Store, folders: &Folders, worker: &Path) -> Result<Process, NotYet> {
    let namespace = meta::namespace(pod);
    let spec = pod.spec.clone().unwrap_or_default();
    let folder = folders.pod(&namespace, &pod.name_any());
    let termination_log = folder.join("termination-log");
    let mut places = mounts(container, &spec.volumes.unwrap_or_default(), folders, &namespace, &folder);
    places.push((names::TERMINATION_LOG.to_owned(), termination_log.clone()));
    // The longest path first, so that a mount inside another one is found.
    places.sort_by_key(|(path, _)| std::cmp::Reverse(path.len()));
    let mut command = container.command.clone().unwrap_or_default().into_iter().chain(container.args.clone().unwrap_or_default());
    let program = command.next().ok_or_else(|| NotYet::creating("the container has no command"))?;
    let args = command.map(|argument| rewrite(&argument, &places, container, store)).collect::<Result<_, _>>()?;
    Ok(Process {
        program: if program == names::WORKER { worker.to_owned() } else { PathBuf::from(program) },
        args,
        env: environment(container, folders, &namespace)?,
        inherited: if container.name == names::FETCH { OF_FETCHES } else { &[] },
        log: folders.log(&namespace, &pod.name_any()),
        folder,
        termination_log,
    })
}

/// A container's variables, those of whole Secrets first.
fn environment(container: &Container, folders: &Folders, namespace: &str) -> Result<Vec<(String, String)>, NotYet> {
    let mut variables = Vec::new();
    for name in container.env_from.iter().flatten().filter_map(|source| source.secret_ref.as_ref()).map(|secret| &secret.name) {
        let missing = |_| NotYet { reason: "CreateContainerConfigError", message: format!("secret {name:?} not found") };
        for entry in fs::read_dir(folders.secret(namespace, name)).map_err(missing)?.flatten() {
            let value = fs::read_to_string(entry.path()).unwrap_or_default();
            variables.push((entry.file_name().to_string_lossy().into_owned(), value));
        }
    }
    for variable in container.env.iter().flatten() {
        variables.extend(value(variable, container, folders, namespace)?.map(|value| (variable.name.clone(), value)));
    }
    Ok(variables)
}

/// The value of an environment variable: its own, a key of a Secret or a ConfigMap, or one of the container's limits in bytes, where it has it.
fn value(variable: &EnvVar, container: &Container, folders: &Folders, namespace: &str) -> Result<Option<String>, NotYet> {
    let source = variable.value_from.as_ref();
    if let Some(secret) = source.and_then(|source| source.secret_key_ref.as_ref()) {
        let text = fs::read_to_string(folders.secret(namespace, &secret.name).join(&secret.key)).ok();
        let message = format!("couldn't find key {} in Secret {namespace}/{}", secret.key, secret.name);
        let needed = secret.optional != Some(true);
        return if text.is_none() && needed { Err(NotYet { reason: "CreateContainerConfigError", message }) } else { Ok(text) };
    }
    if let Some(map) = source.and_then(|source| source.config_map_key_ref.as_ref()) {
        return Ok(fs::read_to_string(folders.config_map(namespace, &map.name).join(&map.key)).ok());
    }
    let limit = || {
        let resource = variable.value_from.as_ref()?.resource_field_ref.as_ref()?.resource.strip_prefix("limits.")?;
        let quantity = container.resources.as_ref()?.limits.as_ref()?.get(resource)?;
        Bytes::read(&quantity.0).map(|bytes| bytes.0.to_string())
    };
    Ok(variable.value.clone().or_else(limit))
}

/// The loopback port that stands for `port` of the container, once the pod was given one.
pub fn host_port(container: &Container, port: i32) -> Option<i32> {
    container.ports.iter().flatten().find(|own| own.container_port == port)?.host_port
}

/// `http://127.0.0.1:PORT` of a pod's first port.
pub fn address(pod: &Pod) -> Option<String> {
    let container = pod.spec.as_ref()?.containers.first()?;
    local_url(container, container.ports.as_ref()?.first()?.container_port)
}

fn local_url(container: &Container, port: i32) -> Option<String> {
    host_port(container, port).map(|port| format!("http://127.0.0.1:{port}"))
}

fn mounts(container: &Container, volumes: &[Volume], folders: &Folders, namespace: &str, pod: &Path) -> Vec<(String, PathBuf)> {
    let folder = |name: &str| {
        let volume = volumes.iter().find(|volume| volume.name == name)?;
        if let Some(claim) = &volume.persistent_volume_claim {
            return Some(folders.claim(namespace, &claim.claim_name));
        }
        if let Some(name) = volume.secret.as_ref().and_then(|secret| secret.secret_name.as_ref()) {
            return Some(folders.secret(namespace, name));
        }
        if let Some(host) = &volume.host_path {
            return Some(PathBuf::from(&host.path));
        }
        // What was fetched for one pod is there for the next one.
        if name == names::CACHE_VOLUME && volume.empty_dir.is_some() {
            return Some(folders.models());
        }
        let config_map = volume.config_map.as_ref().map(|source| folders.config_map(namespace, &source.name));
        config_map.or_else(|| volume.empty_dir.as_ref().map(|_| pod.join(name)))
    };
    let mounts = container.volume_mounts.iter().flatten();
    mounts.filter_map(|mount| Some((mount.mount_path.clone(), folder(&mount.name)?))).collect()
}

fn rewrite(argument: &str, places: &[(String, PathBuf)], container: &Container, store: &Store) -> Result<String, NotYet> {
    for (path, folder) in places {
        if let Some(rest) = argument.strip_prefix(path.as_str()).filter(|rest| rest.is_empty() || rest.starts_with('/')) {
            let path = if rest.is_empty() { folder.clone() } else { folder.join(rest.trim_start_matches('/')) };
            return Ok(path.to_string_lossy().into_owned());
        }
    }
    if let Some(port) = argument.strip_prefix("0.0.0.0:").and_then(|port| port.parse().ok()) {
        let local = host_port(container, port).ok_or_else(|| NotYet::creating(format!("port {port} has no local port yet")))?;
        return Ok(format!("127.0.0.1:{local}"));
    }
    if argument.split(',').all(|url| service(url).is_some()) {
        let urls = argument.split(',').filter_map(service).map(|(name, namespace, port)| endpoints(name, namespace, port, store));
        return Ok(urls.collect::<Result<Vec<_>, _>>()?.join(","));
    }
    Ok(argument.to_owned())
}

/// Name, namespace and port of `http://SERVICE.NAMESPACE.svc:PORT`.
fn service(url: &str) -> Option<(&str, &str, i32)> {
    let (host, port) = url.strip_prefix("http://")?.split_once(':')?;
    let (name, namespace) = host.strip_suffix(".svc")?.split_once('.')?;
    Some((name, namespace, port.parse().ok()?))
}

/// The addresses of a Service's pods, ready or not: a pod keeps its port over restarts, and clients retry.
fn endpoints(name: &str, namespace: &str, port: i32, store: &Store) -> Result<String, NotYet> {
    let service: Service = store.get(namespace, name).ok_or_else(|| NotYet::creating(format!("Service {namespace}/{name} not found")))?;
    let selector = service.spec.and_then(|spec| spec.selector).unwrap_or_default();
    let selected =
        |pod: &Pod| meta::namespace(pod) == namespace && selector.iter().all(|(key, value)| pod.labels().get(key) == Some(value));
    let url = |pod: &Pod| local_url(pod.spec.as_ref()?.containers.first()?, port);
    let urls: Vec<String> = store.list::<Pod>().iter().filter(|pod| selected(pod)).filter_map(url).collect();
    if urls.is_empty() { Err(NotYet::creating(format!("Service {namespace}/{name} has no pods"))) } else { Ok(urls.join(",")) }
}
