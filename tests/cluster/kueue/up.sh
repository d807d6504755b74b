#!/bin/bash
# up.sh : Kueue beside the API server of node 1, with the definitions, rights and webhooks of its chart, as a process instead of a pod
. "$(dirname "$0")/../lib/common.sh"
FOLDER=$RUN/kueue
CERTIFICATES=$FOLDER/certificates

[ -x "$TOOLS/kueue" ] || fail "kueue is missing: run \`make cluster-kueue\`"
mkdir -p "$CERTIFICATES"
sed "s|CERTIFICATES|$CERTIFICATES|" "$HERE/kueue/config.yaml" >"$FOLDER/config.yaml"
sed 's|user: {client|user: {as: "system:serviceaccount:kueue-system:kueue-controller-manager", client|' "$KUBECONFIG" >"$FOLDER/kubeconfig"

kubectl_admin create namespace kueue-system >"$FOLDER/chart.log"
helm template kueue "$TOOLS/kueue-chart" --namespace kueue-system \
    --show-only 'templates/crd/*' --show-only 'templates/rbac/*' --show-only 'templates/internalcert/*' --show-only templates/webhook/manifests.yaml |
    kubectl_admin apply --server-side --filename - --filename "$HERE/kueue/service.yaml" >>"$FOLDER/chart.log"
kubectl_admin wait --for=condition=Established crd --all --timeout=60s >>"$FOLDER/chart.log"

# In a pod, the kubelet would mount the Secret that Kueue fills.
mount_certificates() {
    local file
    for file in ca.crt tls.key tls.crt; do
        kubectl_admin --namespace kueue-system get secret kueue-webhook-server-cert \
            --output "go-template={{index .data \"$file\" | base64decode}}" >"$FOLDER/$file" && mv "$FOLDER/$file" "$CERTIFICATES" || return
    done
}

start 1 kueue env KUBECONFIG="$FOLDER/kubeconfig" kueue --config "$FOLDER/config.yaml" --feature-gates=VisibilityOnDemand=false
wait_for 60 1 kueue mount_certificates
wait_for 120 1 kueue inside 1 curl -fs http://127.0.0.1:9440/readyz
