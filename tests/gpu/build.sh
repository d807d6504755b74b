#!/usr/bin/env bash
# Builds for CUDA and packs what `check.py` needs on a machine with a GPU: build.sh OUTPUT, with the venv of the toolkit in CUDA.
set -euo pipefail
cd "$(dirname "$0")/../.."
output=$1
bundle=$(mktemp -d)
trap 'rm -rf "$bundle"' EXIT
mkdir -p "$bundle"/worker "$bundle"/tests/{gpu,oracles} "$(dirname "$output")"

cuda() {
    tests/gpu/toolkit.sh "${CUDA:?}" cargo "$@" --release --locked --features carryon-worker/cuda --message-format json-render-diagnostics
}
cuda test --test oracles --test head --no-run >"$bundle/built"
cuda build --example bench_device --example bench_head >>"$bundle/built"
python3 - "$bundle" <<'END'
import json, pathlib, subprocess, sys
bundle = pathlib.Path(sys.argv[1])
for line in (bundle / "built").read_text().splitlines():
    made = json.loads(line)
    if made.get("executable") and made["target"]["name"] in ("oracles", "head", "bench_device", "bench_head"):
        subprocess.run(["strip", "-o", bundle / "worker" / made["target"]["name"], made["executable"]], check=True)
END
rm "$bundle/built"
# An oracle reads it.
cp LICENSE "$bundle/"
cp tests/gpu/check.py "$bundle/tests/gpu/"
cp -r tests/oracles/fixtures "$bundle/tests/oracles/"
# The programs have candle's kernels in common: within one window they are packed once.
tar -C "$bundle" -c LICENSE tests worker | xz --lzma2=preset=6,dict=128MiB >"$output.new"
mv "$output.new" "$output"
size=$(stat -c %s "$output")
echo "$output: $((size >> 20)) MiB"
[ "$size" -le $((60 << 20)) ] || { echo "that is more than 60 MiB" >&2; exit 1; }
