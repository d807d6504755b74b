#!/bin/bash
# debian.sh : the programs that are not built from source, installed from Debian's packages where they are missing
set -euo pipefail
missing=()
# need PROGRAM PACKAGE
need() { [ -x "$1" ] || command -v "$1" >/dev/null || missing+=("$2"); }
need containerd containerd
need runc runc
need /usr/lib/cni/ptp containernetworking-plugins
need etcd etcd-server
need nft nftables
need iptables iptables
need ip iproute2
need openssl openssl
need curl curl
need pgrep procps
need gcc build-essential
[ ${#missing[@]} -gt 0 ] || exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "cluster tools: install these packages, or run this as root on Debian: ${missing[*]}" >&2
    exit 1
fi
echo "installing ${missing[*]}" >&2
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -qq --yes --no-install-recommends "${missing[@]}" >/dev/null
