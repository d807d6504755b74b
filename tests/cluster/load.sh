#!/bin/bash
# load.sh TAR… : imports images into every node that runs
. "$(dirname "$0")/lib/common.sh"
. "$LIB/agents.sh"
for pid in "$RUN"/node*/init.pid; do
    number=${pid%/init.pid}
    import "${number##*/node}" "$@"
done
