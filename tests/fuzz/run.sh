#!/usr/bin/env bash
# `run.sh BINARY FOLDER`: each reader for FUZZ_SECONDS, from the kept corpus and from what was found before. Ends at the first failure, whose input lies in FOLDER.
set -euo pipefail
binary=$1 folder=$2 kept=$(dirname "$0")/corpus total=0
for target in ${FUZZ_TARGETS:-gguf safetensors index config vocabulary tokenizer template}; do
    mkdir -p "$folder/$target"
    CARRYON_FUZZ=$target "$binary" "$folder/$target" "$kept/$target" -max_total_time="${FUZZ_SECONDS:-60}" -timeout=30 -rss_limit_mb=2048 \
        -max_len=16384 -len_control=20 -artifact_prefix="$folder/$target-" -print_final_stats=1 >"$folder/$target.log" 2>&1 || { tail -40 "$folder/$target.log"; exit 1; }
    runs=$(sed -n 's/^stat::number_of_executed_units: *//p' "$folder/$target.log")
    total=$((total + runs))
    echo "fuzz $target: $runs executions"
done
echo "fuzz: $total executions, no crash, no hang, nothing beyond its bound"
