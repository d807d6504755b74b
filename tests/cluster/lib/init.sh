# PID 1 of a node: init.sh owned|free DIR. With it every process and mount of the node ends.
# Owned: it lives while the other end of its standard input is open, so no node outlives the test that made it.
set -eu
mount --make-rshared /
mount -t tmpfs tmpfs /run
# What the node's programs write outside their own folders (/var/lib/cni, /var/lib/kubelet, /var/log/containers) stays in the node.
mkdir -p /run/var/upper /run/var/work /run/sysctl
mount -t overlay -o lowerdir=/var,upperdir=/run/var/upper,workdir=/run/var/work overlay /var
# The kubelet writes these settings of the whole machine unless they read as it wants: show it files that do.
for setting in vm/overcommit_memory=1 kernel/panic=10 kernel/panic_on_oops=1; do
    file=/run/sysctl/$(tr / . <<<"${setting%=*}")
    echo "${setting#*=}" >"$file"
    mount --bind "$file" "/proc/sys/${setting%=*}"
done
hostname "$(basename "$2")"
ip link set lo up
sysctl -qw net.ipv4.ip_forward=1
# Packets between nodes cross a bridge; iptables must not see them there.
[ ! -e /proc/sys/net/bridge ] || sysctl -qw net.bridge.bridge-nf-call-iptables=0
touch "$2/ready"
if [ "$1" = owned ]; then cat >/dev/null; else sleep infinity; fi
