#!/usr/bin/env bash
# Unpacks the bundle and runs its check on the CPU, beside a driver that knows no device: smoke.sh BUNDLE, with the venv of the toolkit in CUDA.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
tar -C "$folder" -xf "$1"
"$(dirname "$0")/toolkit.sh" "${CUDA:?}" "${PYTHON:-python3}" "$folder/tests/gpu/check.py" --smoke
