# Certificates and kubeconfigs, anew for each cluster.

make_pki() { # last node
    mkdir -p "$PKI"
    local number
    key sa
    openssl pkey -in "$PKI/sa.key" -pubout -out "$PKI/sa.pub"
    key ca
    openssl req -x509 -new -key "$PKI/ca.key" -out "$PKI/ca.crt" -days 3650 -subj /CN=test-cluster \
        -addext basicConstraints=critical,CA:TRUE -addext keyUsage=critical,keyCertSign,cRLSign
    certificate apiserver /CN=kube-apiserver serverAuth \
        "DNS:localhost,DNS:kubernetes,DNS:kubernetes.default,DNS:kubernetes.default.svc,IP:127.0.0.1,IP:10.96.0.1,IP:10.200.0.1"
    certificate apiserver-kubelet-client /O=system:masters/CN=kube-apiserver-kubelet-client clientAuth
    certificate admin /O=system:masters/CN=admin clientAuth
    for name in kube-controller-manager kube-scheduler kube-proxy; do
        certificate "$name" "/CN=system:$name" clientAuth
        kubeconfig "$name" >"$PKI/$name.kubeconfig"
    done
    for number in $(seq "$1"); do
        certificate "node$number" "/O=system:nodes/CN=system:node:node$number" clientAuth,serverAuth "DNS:node$number,IP:10.200.0.$number"
        kubeconfig "node$number" >"$PKI/node$number.kubeconfig"
    done
    kubeconfig admin >"$KUBECONFIG"
}

key() { openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out "$PKI/$1.key"; }

# certificate NAME SUBJECT USAGE [ADDRESSES]
certificate() {
    key "$1"
    openssl req -new -key "$PKI/$1.key" -subj "$2" |
        openssl x509 -req -CA "$PKI/ca.crt" -CAkey "$PKI/ca.key" -CAcreateserial -days 3650 -out "$PKI/$1.crt" \
            -extfile <(echo "extendedKeyUsage=$3"; [ -z "${4:-}" ] || echo "subjectAltName=$4") 2>/dev/null
}

kubeconfig() {
    cat <<YAML
apiVersion: v1
kind: Config
clusters: [{name: test, cluster: {server: "$API_SERVER", certificate-authority: $PKI/ca.crt}}]
users: [{name: $1, user: {client-certificate: $PKI/$1.crt, client-key: $PKI/$1.key}}]
contexts: [{name: test, context: {cluster: test, user: $1}}]
current-context: test
YAML
}
