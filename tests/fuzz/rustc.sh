#!/bin/sh
# Our own crates with what libFuzzer counts, on a stable compiler; as RUSTC_WORKSPACE_WRAPPER it leaves all others as they are built already.
compiler=$1
shift
case " $* " in
*" --crate-name carryon_worker "* | *" --crate-name carryon_crds "* | *" --crate-name carryon_fuzz "*)
    exec "$compiler" "$@" --cfg fuzzing -Ccodegen-units=4 -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
        -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table -Cllvm-args=-sanitizer-coverage-trace-compares ;;
esac
exec "$compiler" "$@"
