#!/bin/bash
# claim.sh NAMESPACE NAME FILE=PATH… : what the claim NAME of NAMESPACE will hold. Call it before the claim is made.
. "$(dirname "$0")/lib/common.sh"
. "$LIB/storage.sh"
namespace=$1 claim=$2 name=$1-$2
manifest=$(volume "$name" "$namespace" "$claim")
for file in "${@:3}"; do
    target=$RUN/volumes/$name/${file%%=*} source=${file#*=}
    mkdir -p "$(dirname "$target")"
    # A link when both lie on one file system: pods cannot write to a file that is root's.
    ln -f "$source" "$target" 2>/dev/null || cp "$source" "$target"
done
kubectl_admin apply -f - <<<"$manifest"
