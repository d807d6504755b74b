#!/bin/sh
# A RUSTC_WORKSPACE_WRAPPER: our own crates with what libFuzzer counts and compares, on a stable compiler; all others stay as they are built already.
exec "$@" -Copt-level=1 -Ccodegen-units=16 -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table -Cllvm-args=-sanitizer-coverage-trace-compares
