# etcd, kube-apiserver, kube-controller-manager and kube-scheduler, on node 1.

start_etcd() {
    local client=http://127.0.0.1:2379 peer=http://127.0.0.1:2380
    start 1 etcd etcd --name test --data-dir "$RUN/etcd" --unsafe-no-fsync --log-level warn \
        --listen-client-urls $client --advertise-client-urls $client \
        --listen-peer-urls $peer --initial-advertise-peer-urls $peer --initial-cluster test=$peer
    wait_for 20 1 etcd inside 1 curl -fs $client/health
}

# start_api_server FLAG… : it shares the cores with everything else, and takes memory to collect less often.
start_api_server() {
    start 1 kube-apiserver env GOGC=300 kube-apiserver --etcd-servers=http://127.0.0.1:2379 \
        --bind-address=0.0.0.0 --advertise-address=10.200.0.1 --secure-port=6443 \
        --tls-cert-file="$PKI/apiserver.crt" --tls-private-key-file="$PKI/apiserver.key" --client-ca-file="$PKI/ca.crt" \
        --service-account-issuer=https://kubernetes.default.svc \
        --service-account-key-file="$PKI/sa.pub" --service-account-signing-key-file="$PKI/sa.key" \
        --authorization-mode=Node,RBAC --enable-admission-plugins=NodeRestriction \
        --service-cluster-ip-range=$SERVICES --allow-privileged=true \
        --kubelet-certificate-authority="$PKI/ca.crt" --kubelet-preferred-address-types=InternalIP \
        --kubelet-client-certificate="$PKI/apiserver-kubelet-client.crt" --kubelet-client-key="$PKI/apiserver-kubelet-client.key" \
        --audit-policy-file="$LIB/audit.yaml" --audit-log-path="$RUN/audit.log" \
        --default-not-ready-toleration-seconds=10 --default-unreachable-toleration-seconds=10 "$@"
    wait_for 90 1 kube-apiserver kubectl_admin get --raw /readyz
}

# start_controllers LIST : all controllers when it is *. A node's death is noticed after 20 s instead of 50: tests wait for it.
start_controllers() {
    start 1 kube-controller-manager kube-controller-manager --controllers="$1" --leader-elect=false \
        --kubeconfig="$PKI/kube-controller-manager.kubeconfig" --authentication-kubeconfig="$PKI/kube-controller-manager.kubeconfig" \
        --authorization-kubeconfig="$PKI/kube-controller-manager.kubeconfig" --bind-address=127.0.0.1 \
        --use-service-account-credentials=true --service-account-private-key-file="$PKI/sa.key" --root-ca-file="$PKI/ca.crt" \
        --cluster-signing-cert-file="$PKI/ca.crt" --cluster-signing-key-file="$PKI/ca.key" \
        --kube-api-qps=200 --kube-api-burst=400 --allocate-node-cidrs=false --service-cluster-ip-range=$SERVICES --node-monitor-grace-period=20s
}

start_scheduler() {
    start 1 kube-scheduler kube-scheduler --leader-elect=false --bind-address=127.0.0.1 \
        --kubeconfig="$PKI/kube-scheduler.kubeconfig" --authentication-kubeconfig="$PKI/kube-scheduler.kubeconfig" \
        --authorization-kubeconfig="$PKI/kube-scheduler.kubeconfig"
}

wait_for_controllers() { wait_for 60 1 kube-controller-manager inside 1 curl -fsk https://127.0.0.1:10257/healthz; }
wait_for_scheduler() { wait_for 60 1 kube-scheduler inside 1 curl -fsk https://127.0.0.1:10259/healthz; }
