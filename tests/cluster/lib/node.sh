# A node: its namespaces, its place in the network, its cgroups; and their end.

# make_node N LAST owned|free : node N of a cluster whose last node is LAST
make_node() {
    local number=$1 last=$2 dir parent init other; dir=$(node_dir "$number")
    mkdir -p "$dir"; rm -f "$dir/ready"
    setsid unshare --mount --uts --ipc --net --pid --fork --kill-child --mount-proc --propagation private \
        bash "$LIB/init.sh" "$3" "$dir" <&3 >"$dir/init.log" 2>&1 &
    parent=$!
    until [ -e "$dir/ready" ]; do kill -0 $parent 2>/dev/null || explain "node$number did not start" "$dir/init.log"; sleep 0.02; done
    init=$(tr -d ' ' <"/proc/$parent/task/$parent/children")
    echo "$init" >"$dir/init.pid"
    if [ "$number" = 1 ]; then
        inside 1 ip link add br0 type bridge
        attach 1 br0
    else
        # From outside node 1's process namespace: inside it the other node's process has no number.
        nsenter -t "$(<"$(node_dir 1)/init.pid")" -n ip link add "node$number" type veth peer name eth0 netns "$init"
        inside 1 ip link set "node$number" master br0 up
        attach "$number" eth0
    fi
    for other in $(seq "$last"); do
        [ "$other" = "$number" ] || inside "$number" ip route replace "10.244.$other.0/24" via "10.200.0.$other"
    done
    make_cgroups "$number"
}

# attach N DEVICE : the node's address, and a default route, which kubelet and kube-proxy ask for
attach() {
    inside "$1" ip addr add "10.200.0.$1/24" dev "$2"
    inside "$1" ip link set "$2" up
    inside "$1" ip route replace default dev "$2"
}

make_cgroups() {
    local hierarchy group file
    [ -d /sys/fs/cgroup/cpuset ] || fail "needs the cgroup v1 hierarchies under /sys/fs/cgroup (cgroup v2 alone is not supported yet)"
    for hierarchy in /sys/fs/cgroup/*/; do
        group=$hierarchy$CGROUP-node$1
        mkdir -p "$group"
        echo "$group" >>"$(node_dir "$1")/cgroups"
        for file in cpuset.cpus cpuset.mems; do
            [ ! -e "$hierarchy/$file" ] || cat "$hierarchy/$file" >"$group/$file"
        done
    done
}

# kill_nodes [N] : ends the node, or all of this cluster, whoever made them and however that ended
kill_nodes() {
    local node="lib/init.sh (owned|free) $RUN/node${1:-[0-9]+}\$" inits pids pid file
    inits=$(pgrep -f -- "^bash [^ ]*$node" || true)
    # Parents outside the nodes: unshare's, and one of each service. They end by themselves when they have fetched an exit status.
    pids=$(pgrep -f -- "$node" || true)
    for file in "$RUN"/node${1:-*}/*.pid; do
        # It may go at any moment: another test clears up too.
        pid=$(cat "$file" 2>/dev/null || true)
        [ -z "$pid" ] || ! grep -qsx nsenter "/proc/$pid/comm" || pids+=" $pid"
    done
    for pid in $inits; do kill -9 "$pid" || true; done
    # One that a test has stopped, and was itself killed before it went on, fetches nothing.
    for pid in $pids; do kill -CONT "$pid" 2>/dev/null || true; done
    for pid in $pids; do
        for _ in $(seq 200); do runs "$pid" || break; sleep 0.05; done
        ! runs "$pid" || fail "process $pid does not end: $(tr '\0' ' ' <"/proc/$pid/cmdline")"
    done
    rm -f "$RUN"/node${1:-*}/*.pid
}

# Whether a process is more than an exit status that nobody has fetched.
runs() { grep -qs '^State:[[:space:]]*[^ZX]' "/proc/$1/status"; }

# remove_cgroups [N] : of the node, or of all of this cluster
remove_cgroups() {
    local group
    for group in /sys/fs/cgroup/*/"$CGROUP"-node${1:-*}; do
        for _ in $(seq 100); do
            [ -d "$group" ] || break
            find "$group" -depth -type d -exec rmdir {} + 2>/dev/null || sleep 0.05
        done
        [ ! -d "$group" ] || fail "cgroup $group cannot be removed: processes $(cat "$group/cgroup.procs" | tr '\n' ' ')"
    done
}
