#!/bin/bash
# down.sh [--wipe | --node N] : ends the cluster, however it was left; --wipe forgets its state too; --node ends that node alone
. "$(dirname "$0")/lib/common.sh"
. "$LIB/node.sh"
if [ "${1:-}" = --node ]; then
    kill_nodes "$2"
    remove_cgroups "$2"
    exit
fi
kill_nodes
remove_cgroups
[ "${1:-}" != --wipe ] || rm -rf --one-file-system "$RUN"
