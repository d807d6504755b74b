# Settings and helpers of every script of the test cluster; README.md beside them says what they are for.
set -euo pipefail

LIB=$(dirname "$(realpath "${BASH_SOURCE[0]}")")
HERE=$(dirname "$LIB")
CACHE=${CARRYON_CACHE:-$HOME/.cache/carry-on}
TOOLS=${CARRYON_KUBERNETES:-$CACHE/kubernetes}
IMAGES=${CARRYON_IMAGES:-$CACHE/images}
RUN=$(realpath -m "${CARRYON_RUN:-$CACHE/run/cluster}")
PKI=$RUN/pki
export KUBECONFIG=$RUN/kubeconfig PATH=$TOOLS:$PATH

# Node N is 10.200.0.N, its pods 10.244.N.0/24. Nothing outside the nodes' network namespaces has or sees these addresses.
API_SERVER=https://10.200.0.1:6443
SERVICES=10.96.0.0/16
DNS=10.96.0.10
# One name per cluster, so that its cgroups are found again when nothing else of it is left.
CGROUP=carryon-$(cksum <<<"$RUN" | cut -d' ' -f1)

say() { printf '%s\n' "$*"; }
fail() { printf 'cluster: %s\n' "$*" >&2; exit 1; }

node_dir() { printf '%s/node%s' "$RUN" "$1"; }

# inside NODE COMMAND… : runs it in the node's namespaces
inside() {
    local dir; dir=$(node_dir "$1"); shift
    [ -s "$dir/init.pid" ] || fail "no node runs in $dir: bring the cluster up first"
    nsenter -t "$(<"$dir/init.pid")" -m -u -i -n -p --wdns="$PWD" "$@"
}

# start NODE NAME COMMAND… : runs it there in the background, its words in NAME.log
start() {
    local dir name=$2; dir=$(node_dir "$1")
    setsid nsenter -t "$(<"$dir/init.pid")" -m -u -i -n -p "${@:3}" >"$dir/$name.log" 2>&1 </dev/null 3<&- &
    echo $! >"$dir/$name.pid"
}

# wait_for SECONDS NODE NAME COMMAND… : until the command succeeds; fails, with the end of NAME.log, when NAME ends or time is up
wait_for() {
    local seconds=$1 name=$3 dir end; dir=$(node_dir "$2"); end=$((SECONDS + seconds))
    until "${@:4}" >/dev/null 2>&1; do
        kill -0 "$(<"$dir/$name.pid")" 2>/dev/null || explain "$name ended on node$2" "$dir/$name.log"
        [ $SECONDS -lt $end ] || explain "$name on node$2 is not ready after $seconds s ($4 ${5:-} … keeps failing)" "$dir/$name.log"
        sleep 0.1
    done
}

explain() { printf 'cluster: %s; the end of %s:\n' "$1" "$2" >&2; tail -n 20 "$2" >&2; exit 1; }

kubectl_admin() { inside 1 kubectl "$@"; }
