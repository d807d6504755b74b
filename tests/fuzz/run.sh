#!/usr/bin/env bash
# Each reader for FUZZ_SECONDS, from the kept corpus and what was found before: `run.sh BINARY FOLDER`. Ends at the first crash, whose input lies in FOLDER.
set -euo pipefail
binary=$1 folder=$2 kept=$(dirname "$0")/corpus total=0
for target in ${FUZZ_TARGETS:-gguf safetensors index config tokenizer template}; do
    mkdir -p "$folder/$target"
    log=$(CARRYON_FUZZ=$target "$binary" "$folder/$target" "$kept/$target" -max_total_time="${FUZZ_SECONDS:-60}" -runs="${FUZZ_RUNS:--1}" -timeout=10 -rss_limit_mb=1500 \
        -max_len=16384 -len_control=20 -close_fd_mask=1 -artifact_prefix="$folder/$target-" -print_final_stats=1 2>&1) || { echo "$log" | tail -40; exit 1; }
    runs=$(sed -n 's/^stat::number_of_executed_units: *//p' <<<"$log")
    total=$((total + runs))
    echo "fuzz $target: $runs executions, peak $(sed -n 's/^stat::peak_rss_mb: *//p' <<<"$log") MiB"
done
echo "fuzz: $total executions, no crash, no hang, nothing beyond its bound"
