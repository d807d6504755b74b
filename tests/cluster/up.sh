#!/bin/bash
# up.sh [--nodes N] [--controllers LIST] [--owned]
# A Kubernetes cluster of N real nodes (default 1), or, with --nodes 0, an API server alone, beside it the named controllers.
# --owned: it lives while standard input is open.
. "$(dirname "$0")/lib/common.sh"
for part in node pki control_plane agents storage; do . "$LIB/$part.sh"; done

nodes=1 controllers='' life=free
exec 3</dev/null
while [ $# -gt 0 ]; do
    case $1 in
    --nodes) nodes=$2; shift 2 ;;
    --controllers) controllers=$2; shift 2 ;;
    --owned) life=owned; exec 3<&0; shift ;;
    *) fail "unknown argument $1; $(sed -n 2p "$0")" ;;
    esac
done

check_tools() {
    [ "$(id -u)" = 0 ] || fail "needs root: nodes are made of mount, network and process namespaces"
    local programs=(kube-apiserver kubectl etcd openssl curl ip nsenter unshare pgrep) program
    [ "$nodes" = 0 ] || programs+=(kube-controller-manager kube-scheduler kubelet kube-proxy kube-network-policies containerd ctr runc nft iptables)
    for program in "${programs[@]}"; do
        command -v "$program" >/dev/null || fail "$program is missing: run \`make cluster-tools\`"
    done
}

started=$(date +%s%N)
elapsed() { local tenths=$((($(date +%s%N) - started) / 100000000)); printf '%d.%d s' $((tenths / 10)) $((tenths % 10)); }

# each COMMAND ARGUMENT… : COMMAND NODE ARGUMENT… for all nodes at once
each() {
    local number jobs=() job
    for number in $(seq "$nodes"); do "$1" "$number" "${@:2}" & jobs+=($!); done
    for job in "${jobs[@]}"; do wait "$job"; done
}

prepare_containers() { start_containerd "$1" && import "$1" "$IMAGES"/{pause,coredns,shell}.tar; }

check_tools
[ ! -e "$RUN/node1" ] || "$HERE/down.sh" --wipe
mkdir -p "$RUN"
last=$((nodes > 0 ? nodes : 1))
for number in $(seq $last); do make_node "$number" $last $life; done
make_pki $last

if [ "$nodes" = 0 ]; then
    start_etcd
    # No one makes service accounts here: pods are taken without one.
    start_api_server --disable-admission-plugins=ServiceAccount
    [ -z "$controllers" ] || { start_controllers "$controllers"; wait_for_controllers; }
    say "API server ready after $(elapsed): KUBECONFIG=$KUBECONFIG, reached by $HERE/exec.sh"
    exit
fi

each prepare_containers &
containers=$!
start_etcd
start_api_server
start_controllers "${controllers:-*}"
start_scheduler
make_storage
kubectl_admin apply -f "$LIB/dns.yaml" >"$RUN/dns.log"
wait $containers
each start_kubelet
each start_proxy
each start_policies
wait_for_controllers
wait_for_scheduler
each wait_for_agents
wait_for 60 1 kubelet kubectl_admin -n kube-system wait --for=condition=Available deployment/coredns --timeout=1s
each wait_for_dns
say "$nodes nodes ready after $(elapsed): KUBECONFIG=$KUBECONFIG, reached by $HERE/exec.sh"
