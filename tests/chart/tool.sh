#!/bin/bash
# tool.sh FOLDER/NAME@VERSION : promtool, kube-score or crdify from its Go module, with the dependencies that the module itself pins.
set -euo pipefail
out=$(realpath -m "$1")
name=$(basename "$out")
package=./cmd/${name%@*}
case $name in
promtool@*) module=github.com/prometheus/prometheus sum=h1:f1GRFerhTMKQma+awCoC9T820ecWeGSdF+xAlMHzZzM= ;;
kube-score@*) module=github.com/zegl/kube-score sum=h1:J1VqK86SunV4Gg8emPTmwUVxe0rmXnAs5K9ZUbGMKR8= ;;
crdify@*) module=sigs.k8s.io/crdify package=. sum=h1:mrMH9CgXQPTZUpTU6Klqfnlys8bggv/7uvLT2lXSP7A= ;;
*) echo "$name: not known" >&2; exit 1 ;;
esac
command -v go >/dev/null || { echo "${name%@*}: Go 1.26 or later is missing: https://go.dev/dl" >&2; exit 1; }
echo "making $name" >&2
export GOMODCACHE=$out.modules GOWORK=off
downloaded=$(cd / && go mod download -json "$module@${name#*@}")
of_module() { python3 -c 'import json, sys; print(json.load(sys.stdin)[sys.argv[1]])' "$1" <<<"$downloaded"; }
[ "$(of_module Sum)" = "$sum" ] || { echo "$name is not what it was: $(of_module Sum), not $sum" >&2; exit 1; }
cd "$(of_module Dir)"
# Of all that Prometheus scrapes, its rules need nothing.
CGO_ENABLED=0 GOGC=400 go build -trimpath -gcflags=all=-dwarf=false -ldflags '-s -w' -tags remove_all_sd -o "$out" "$package"
go clean -modcache
