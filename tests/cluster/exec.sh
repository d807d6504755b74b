#!/bin/bash
# exec.sh [--node N] COMMAND… : runs it inside the namespaces of a node (default 1), with KUBECONFIG set and kubectl and helm on PATH
. "$(dirname "$0")/lib/common.sh"
node=1
if [ "${1:-}" = --node ]; then node=$2; shift 2; fi
inside "$node" "$@"
