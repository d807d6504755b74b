//! A validated deployment's children: the gateway's Deployment, its Service and its configuration.

use carryon_crds::deployment::ApiKey;
use carryon_crds::names;
use k8s_openapi::api::apps::v1::{ControllerRevision, Deployment, DeploymentSpec, DeploymentStrategy, RollingUpdateDeployment};
use k8s_openapi::api::core::v1::{
    Affinity, ConfigMap, Pod, PodAffinityTerm, PodAntiAffinity, PodTemplateSpec, Service, WeightedPodAffinityTerm,
};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::Validated;
use crate::shared::meta::{self, Owner};
use crate::shared::network_policy::{self, Peers};
use crate::shared::pods::{self, Lifetime, Mount, MountSource, Role, progress_deadline};
use crate::shared::rollout::Counts;
use crate::shared::sharing::PoolPath;

/// What a deployment is made of.
#[derive(Clone, Debug, PartialEq)]
pub struct Children {
    /// What the pods are rendered as.
    pub revision: ControllerRevision,
    /// The worker's configuration.
    pub config_map: ConfigMap,
    /// The OpenAI endpoint.
    pub service: Service,
    /// Who may reach the pods, where that is said.
    pub network_policy: Option<NetworkPolicy>,
    /// The gateway's pods.
    pub deployment: Deployment,
    /// One pod at a time may be evicted.
    pub disruption_budget: PodDisruptionBudget,
}

/// The children as the cluster holds them after they were applied.
#[derive(Clone, Debug, PartialEq)]
pub struct Applied {
    /// The Deployment, with its status.
    pub deployment: Deployment,
}

impl Applied {
    /// Whether no pod of an earlier revision is there, or can come again.
    pub fn is_rolled_out(&self) -> bool {
        self.deployment.status.is_some() && Counts::of_deployment(&self.deployment).is_rolled_out()
    }
}

/// The pods, rendered today.
fn template(gateway: &Validated) -> PodTemplateSpec {
    let pools = gateway.pools.iter().enumerate().map(|(place, pool)| (if place == 0 { "--pool" } else { "--other-pool" }, pool.url()));
    let mut args: Vec<_> = pools.collect();
    let mut mounts = Vec::new();
    for (entry, served) in gateway.heads.iter().filter_map(|entry| Some((entry, entry.served.as_ref()?))) {
        let path = format!("{}/{}", names::HEADS_DIR, entry.name);
        args.push(("--head", pods::inside(&path, Some(&served.path))));
        let (name, source) = (format!("head-{}", entry.name), MountSource::Claim(served.claim.clone()));
        mounts.push(Mount { name: name.into(), path: path.into(), source, read_only: true });
    }
    for ApiKey { name, secret_ref } in &gateway.keys {
        let path = format!("{}/{name}", names::API_KEYS_DIR);
        args.push(("--api-key-file", pods::inside(&path, Some(&secret_ref.key))));
        let (name, source) = (format!("api-key-{name}"), MountSource::Secret(secret_ref.clone()));
        mounts.push(Mount { name: name.into(), path: path.into(), source, read_only: true });
    }
    let mut template = pods::template(&Role {
        basis: &gateway.basis,
        subcommand: "serve",
        args,
        env: Vec::new(),
        port: names::GATEWAY_PORT,
        mounts,
        before: None,
        lifetime: Lifetime::Server,
    });
    let annotations = template.metadata.get_or_insert_default().annotations.get_or_insert_default();
    annotations.insert(names::POOL_ANNOTATION.to_owned(), PoolPath::annotation(&gateway.pools));
    template.spec.get_or_insert_default().affinity.get_or_insert_with(|| apart(&gateway.basis.owner));
    template
}

/// On nodes of their own, where there are enough: for who says nothing else.
fn apart(owner: &Owner) -> Affinity {
    let term = PodAffinityTerm {
        label_selector: Some(owner.label_selector()),
        topology_key: "kubernetes.io/hostname".to_owned(),
        ..PodAffinityTerm::default()
    };
    let preferred = vec![WeightedPodAffinityTerm { weight: 100, pod_affinity_term: term }];
    let others = PodAntiAffinity { preferred_during_scheduling_ignored_during_execution: Some(preferred), ..PodAntiAffinity::default() };
    Affinity { pod_anti_affinity: Some(others), ..Affinity::default() }
}

/// The pools that gateways work with: those that are to be, and those that still are. The spec may name another one by now.
pub fn pools(gateways: &Deployment, pods: &[Pod]) -> Vec<PoolPath> {
    let user = meta::namespace(gateways);
    let wanted = gateways.spec.as_ref().and_then(|spec| spec.template.metadata.as_ref());
    let present = pods.iter().map(|pod| &pod.metadata).filter(|pod| pod.deletion_timestamp.is_none());
    wanted.into_iter().chain(present).flat_map(|metadata| PoolPath::told(metadata.annotations.as_ref(), &user)).collect()
}

/// Renders the children.
pub fn build(gateway: &Validated) -> Children {
    let owner = &gateway.basis.owner;
    let name = names::gateway(&owner.name);
    let revision = gateway.basis.rendering.revision(&name, &gateway.config, || template(gateway));
    Children {
        revision: revision.kept(owner, &name),
        deployment: Deployment {
            metadata: owner.meta(&name),
            spec: Some(DeploymentSpec {
                replicas: gateway.replicas,
                selector: owner.label_selector(),
                progress_deadline_seconds: Some(progress_deadline(&gateway.basis.template)),
                strategy: Some(rolling()),
                // Those that are left behind could not start: their configuration is gone.
                revision_history_limit: Some(0),
                template: revision.template(),
                ..DeploymentSpec::default()
            }),
            status: None,
        },
        disruption_budget: meta::disruption_budget(owner, &name),
        service: meta::service(owner, &name, names::GATEWAY_PORT, false),
        network_policy: gateway.basis.peers.as_ref().map(|peers| policy(gateway, &name, peers)),
        config_map: revision.config_map(owner),
    }
}

/// Open to everybody, or to the clients that whoever installed the operator has named.
fn policy(gateway: &Validated, name: &str, peers: &Peers) -> NetworkPolicy {
    let from = if peers.clients.is_empty() { vec![] } else { [peers.clients.clone(), peers.watchers()].concat() };
    network_policy::ingress(&gateway.basis.owner, name, names::GATEWAY_PORT, from)
}

/// The old gateway serves until the new one is ready.
fn rolling() -> DeploymentStrategy {
    DeploymentStrategy {
        type_: Some("RollingUpdate".to_owned()),
        rolling_update: Some(RollingUpdateDeployment { max_unavailable: Some(IntOrString::Int(0)), max_surge: Some(IntOrString::Int(1)) }),
    }
}
