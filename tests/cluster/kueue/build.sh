#!/bin/bash
# build.sh OUT : Kueue's manager and its chart, from its Go module, with the dependencies that the module itself pins. Once.
set -euo pipefail
out=$(realpath -m "$1")
VERSION=v0.17.0
SUM=h1:7hzb38M4eKGzYW+CFv2s1L+swzzacUCHOCXxZmAV90I=

[ "$(cat "$out/.kueue" 2>/dev/null)" != "$SUM" ] || exit 0
command -v go >/dev/null || { echo "Kueue: Go 1.26 or later is missing: https://go.dev/dl" >&2; exit 1; }
echo "making Kueue $VERSION" >&2
module=$(cd / && go mod download -json "sigs.k8s.io/kueue@$VERSION")
of_module() { python3 -c 'import json, sys; print(json.load(sys.stdin)[sys.argv[1]])' "$1" <<<"$module"; }
[ "$(of_module Sum)" = "$SUM" ] || { echo "Kueue $VERSION is not what it was: $(of_module Sum), not $SUM" >&2; exit 1; }
cd "$(of_module Dir)"
CGO_ENABLED=0 GOGC=400 go build -trimpath -gcflags=all=-dwarf=false -ldflags '-s -w' -o "$out/kueue" ./cmd/kueue
rm -rf "$out/kueue-chart"
cp -r --no-preserve=mode charts/kueue "$out/kueue-chart"
echo "$SUM" >"$out/.kueue"
