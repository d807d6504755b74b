//! A validated pool's children. A StatefulSet, because it never needs a surge pod when GPUs are scarce
//! and gives each pod the stable address that heads are pushed to.

use carryon_crds::names;
use k8s_openapi::api::apps::v1::{ControllerRevision, StatefulSet, StatefulSetSpec, StatefulSetStatus};
use k8s_openapi::api::core::v1::{ConfigMap, EnvVar, EnvVarSource, PodTemplateSpec, ResourceFieldSelector, Service};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;

use super::Validated;
use super::source::{self, Rendered};
use crate::shared::meta::{self, Owner};
use crate::shared::network_policy::{self, Peers};
use crate::shared::pods::{self, Lifetime, Role};
use crate::shared::rollout::Counts;

/// What a pool is made of.
#[derive(Clone, Debug, PartialEq)]
pub struct Children {
    /// What the pods are rendered as.
    pub revision: ControllerRevision,
    /// The worker's configuration.
    pub config_map: ConfigMap,
    /// The commit that pods fetch which start from now on, once it is known.
    pub commit: Option<ConfigMap>,
    /// Headless: resolves to every ready pod.
    pub service: Service,
    /// Who may reach the pods, where that is said.
    pub network_policy: Option<NetworkPolicy>,
    /// The pods.
    pub stateful_set: StatefulSet,
    /// One pod at a time may be evicted.
    pub disruption_budget: PodDisruptionBudget,
}

/// The children as the cluster holds them after they were applied.
#[derive(Clone, Debug, PartialEq)]
pub struct Applied {
    /// The StatefulSet, with its status.
    pub stateful_set: StatefulSet,
}

impl Applied {
    /// Whether no pod of an earlier revision is there, or can come again.
    pub fn is_rolled_out(&self) -> bool {
        let has_one_revision = |status: &StatefulSetStatus| status.current_revision == status.update_revision;
        Counts::of_stateful_set(&self.stateful_set).is_rolled_out() && self.stateful_set.status.as_ref().is_some_and(has_one_revision)
    }
}

/// The pods, rendered today.
fn template(pool: &Validated) -> PodTemplateSpec {
    let Rendered { mounts, path, before } = source::render(&pool.model, &pool.basis.owner.name);
    pods::template(&Role {
        basis: &pool.basis,
        subcommand: "base",
        args: vec![("--model", path)],
        env: vec![memory_limit()],
        port: names::POOL_PORT,
        mounts,
        before,
        lifetime: Lifetime::Server,
    })
}

/// Tells the worker how much memory its pod may use, once it is made: a LimitRange or an autoscaler may have the last word. Of a pod without a
/// limit the kubelet says what its node gives to pods, which is a limit too.
fn memory_limit() -> EnvVar {
    let limit = ResourceFieldSelector { resource: "limits.memory".to_owned(), ..ResourceFieldSelector::default() };
    let source = EnvVarSource { resource_field_ref: Some(limit), ..EnvVarSource::default() };
    EnvVar { name: names::MEMORY_LIMIT.to_owned(), value: None, value_from: Some(source) }
}

/// Renders the children.
pub fn build(pool: &Validated) -> Children {
    let owner = &pool.basis.owner;
    let name = names::pool(&owner.name);
    let revision = pool.basis.rendering.revision(&name, &pool.config, || template(pool));
    Children {
        revision: revision.kept(owner, &name),
        stateful_set: StatefulSet {
            metadata: owner.meta(&name),
            spec: Some(StatefulSetSpec {
                replicas: pool.replicas,
                service_name: Some(name.clone()),
                pod_management_policy: Some("Parallel".to_owned()),
                selector: owner.label_selector(),
                template: revision.template(),
                ..StatefulSetSpec::default()
            }),
            status: None,
        },
        disruption_budget: meta::disruption_budget(owner, &name),
        service: meta::service(owner, &name, names::POOL_PORT, true),
        network_policy: pool.basis.peers.as_ref().map(|peers| policy(pool, &name, peers)),
        config_map: revision.config_map(owner),
        commit: pool.commit.as_ref().map(|commit| self::commit(owner, commit)),
    }
}

/// A ConfigMap beside the pods' template: were the commit in it, the pod that resolved it would be replaced.
fn commit(owner: &Owner, commit: &str) -> ConfigMap {
    let data = [(names::COMMIT_KEY.to_owned(), commit.to_owned())].into();
    ConfigMap { metadata: owner.meta(names::pool_commit(&owner.name)), data: Some(data), ..ConfigMap::default() }
}

/// Open to those who train on its states and serve with it, in its own namespace and where it is shared.
fn policy(pool: &Validated, name: &str, peers: &Peers) -> NetworkPolicy {
    let users = |namespaces| network_policy::pods_of(&["trainer", "gateway"], namespaces);
    let elsewhere = pool.shared.clone().map(|namespaces| users(Some(namespaces)));
    let from = [users(None)].into_iter().chain(elsewhere).chain(peers.watchers()).collect();
    network_policy::ingress(&pool.basis.owner, name, names::POOL_PORT, from)
}
