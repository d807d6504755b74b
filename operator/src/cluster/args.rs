//! How the operator is started.

use std::net::SocketAddr;

use super::pod_user::PodUser;
use crate::shared::Settings;
use crate::shared::defaults::PodDefaults;
use crate::shared::network_policy::Peers;

/// Arguments of `carryon-operator run`.
#[derive(Clone, Debug, clap::Args)]
pub struct RunArgs {
    /// Worker image of objects that name none.
    #[arg(long, value_name = "IMAGE", default_value_t = Settings::default().worker_image)]
    pub worker_image: String,
    /// Worker image of pools and trainers that ask for a GPU and name none. Without it they are not started.
    #[arg(long, value_name = "IMAGE")]
    pub worker_cuda_image: Option<String>,
    /// User of the workers' pods, and group of the volumes they write: a number, `cluster` where each namespace has its own, or `auto`: 65532,
    /// but `cluster` on OpenShift.
    #[arg(long, value_name = "USER", default_value = "auto")]
    pub pod_user: PodUser,
    /// What every worker's pod gets that does not name it itself, as JSON or YAML: imagePullSecrets, env. It rolls no pod by itself.
    #[arg(long, value_name = "YAML", default_value = "{}")]
    pub pod_defaults: PodDefaults,
    /// Close pods by NetworkPolicies, but for those that ask them: as JSON of NetworkPolicyPeers, the `operator`'s own pods, `scrapers` of metrics,
    /// and `clients` of gateways, which are everybody when none are named. Without it there are no policies, and those of before go.
    #[arg(long, value_name = "PEERS")]
    pub network_policies: Option<Peers>,
    /// Look after this namespace only, or after each that is named so.
    #[arg(long = "namespace", value_name = "NAMESPACE")]
    pub namespaces: Vec<String>,
    /// Address of /healthz, /readyz and /metrics.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:8080")]
    pub listen: SocketAddr,
    /// Namespace of the Lease that the one of several operators for all namespaces holds which works, if not kube-system. One that looks after
    /// some holds a Lease in each of them.
    #[arg(long, value_name = "NAMESPACE", conflicts_with = "namespaces")]
    pub lease_namespace: Option<String>,
    /// Work without a Lease: nothing keeps another operator from working too.
    #[arg(long, conflicts_with = "lease_namespace")]
    pub without_lease: bool,
    /// Who installed this operator; operators of one installation stand in for each other.
    #[arg(long, value_name = "NAME", default_value = "by hand")]
    pub installation: String,
    /// Name of this operator in the Lease; its pod's name.
    #[arg(long, env = "POD_NAME", value_name = "NAME", default_value = "carryon-operator")]
    pub identity: String,
}
