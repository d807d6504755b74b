# What runs on every node: containerd, kubelet, kube-proxy, kube-network-policies.

start_containerd() { # node
    local dir; dir=$(node_dir "$1")
    mkdir -p "$dir/cni" "$dir/containerd"
    cat >"$dir/cni/10-pods.conflist" <<JSON
{"cniVersion": "1.0.0", "name": "pods", "plugins": [{"type": "ptp", "ipMasq": false, "ipam": {"type": "host-local",
  "dataDir": "$dir/cni/addresses", "ranges": [[{"subnet": "10.244.$1.0/24"}]], "routes": [{"dst": "0.0.0.0/0"}]}}]}
JSON
    cat >"$dir/containerd.toml" <<TOML
version = 2
root = "$dir/containerd/root"
state = "$dir/containerd/state"
[grpc]
  address = "$dir/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "localhost/pause:1"
  disable_apparmor = true
  restrict_oom_score_adj = true
  disable_hugetlb_controller = true
  tolerate_missing_hugetlb_controller = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "$dir/cni"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
TOML
    start "$1" containerd containerd -c "$dir/containerd.toml" --log-level warn
    wait_for 20 "$1" containerd ctr_on "$1" version
}

ctr_on() { inside "$1" ctr -a "$(node_dir "$1")/containerd.sock" -n k8s.io "${@:2}"; }

# import NODE TAR… : images without a registry
import() {
    local tar
    for tar in "${@:2}"; do ctr_on "$1" images import "$tar" >/dev/null || fail "node$1 cannot import $tar"; done
}

start_kubelet() { # node
    local dir; dir=$(node_dir "$1")
    mkdir -p "$dir/kubelet" "$dir/pods"
    : >"$dir/resolv.conf"
    cat >"$dir/kubelet.yaml" <<YAML
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
failCgroupV1: false
cgroupDriver: cgroupfs
cgroupRoot: /$CGROUP-node$1
failSwapOn: false
containerRuntimeEndpoint: unix://$dir/containerd.sock
address: 10.200.0.$1
authentication: {anonymous: {enabled: false}, webhook: {enabled: true}, x509: {clientCAFile: $PKI/ca.crt}}
authorization: {mode: Webhook}
tlsCertFile: $PKI/node$1.crt
tlsPrivateKeyFile: $PKI/node$1.key
clusterDNS: [$DNS]
clusterDomain: cluster.local
resolvConf: $dir/resolv.conf
podLogsDir: $dir/pods
volumePluginDir: $dir/kubelet/plugins
makeIPTablesUtilChains: false
imageGCHighThresholdPercent: 100
evictionHard: {memory.available: 100Mi, nodefs.available: "0%", nodefs.inodesFree: "0%", imagefs.available: "0%"}
nodeStatusUpdateFrequency: 5s
nodeLeaseDurationSeconds: 12
maxPods: 60
YAML
    start "$1" kubelet kubelet --config="$dir/kubelet.yaml" --kubeconfig="$PKI/node$1.kubeconfig" --root-dir="$dir/kubelet" \
        --cert-dir="$dir/kubelet/pki" --hostname-override="node$1" --node-ip="10.200.0.$1"
}

start_proxy() { # node
    local dir; dir=$(node_dir "$1")
    cat >"$dir/kube-proxy.yaml" <<YAML
apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
mode: nftables
bindAddress: 10.200.0.$1
nodePortAddresses: ["10.200.0.$1/32"]
healthzBindAddress: 127.0.0.1:10256
clusterCIDR: 10.244.0.0/16
detectLocalMode: ClusterCIDR
hostnameOverride: node$1
clientConnection: {kubeconfig: $PKI/kube-proxy.kubeconfig}
conntrack: {maxPerCore: 0, min: 0, tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 0s}
YAML
    start "$1" kube-proxy kube-proxy --config="$dir/kube-proxy.yaml"
}

# Every new connection of pods waits for its word, from before it is there: none is let through unjudged. What nodes themselves send to their own
# pods, such as probes, is not forwarded and so not asked about.
start_policies() { # node
    inside "$1" iptables -t mangle -A FORWARD -m conntrack --ctstate NEW -j NFQUEUE --queue-num 100
    start "$1" kube-network-policies kube-network-policies "node$1"
}

wait_for_agents() { # node
    wait_for 60 "$1" kubelet kubectl_admin wait --for=condition=Ready "node/node$1" --timeout=1s
    wait_for 30 "$1" kube-proxy inside "$1" curl -fs http://127.0.0.1:10256/healthz
    wait_for 30 "$1" kube-network-policies inside "$1" grep -q . /proc/net/netfilter/nfnetlink_queue
}

# The proxies learn of the pod that answers a moment after it is ready; a name asked for before that is not found.
wait_for_dns() { wait_for 30 "$1" kube-proxy inside "$1" timeout 1 bash -c ": <>/dev/tcp/$DNS/53"; } # node
