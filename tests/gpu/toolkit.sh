#!/bin/bash
# toolkit.sh VENV COMMAND…: runs a command with the CUDA toolkit that VENV holds as wheels. No GPU is needed to build.
set -euo pipefail
venv=$1
shift
home=$(echo "$venv"/lib/python3*/site-packages/nvidia/cu13)
links=$venv/links

# The linker wants names without versions.
if [ ! -e "$links/libcuda.so" ]; then
    mkdir -p "$links"
    for library in "$home"/lib/lib{cublas,cublasLt,curand,nvrtc,cudart}.so.*; do
        name=${library##*/}
        ln -sf "$library" "$links/${name%%.so.*}.so"
    done
    # The driver's library comes with the driver. Until then one under its name says CUDA_ERROR_NO_DEVICE, whatever it is asked.
    grep -oE '\bcu[A-Z][A-Za-z0-9]*(_v[0-9]+)?\b' "$home/include/cuda.h" | sort -u | sed 's/.*/int &(void) { return 100; }/' |
        cc -shared -fPIC -x c -Wl,-soname,libcuda.so.1 -o "$links/libcuda.so.1" -
    ln -s libcuda.so.1 "$links/libcuda.so"
fi

export CUDA_HOME=$home CUDA_PATH=$home CUDA_ROOT=$home CUDA_TOOLKIT_ROOT_DIR=$home NVCC=$home/bin/nvcc
export CUDA_COMPUTE_CAP=${CUDA_COMPUTE_CAP:-90} LIBRARY_PATH=$links PATH=$home/bin:$PATH
# For build scripts and for trying what was built here.
export LD_LIBRARY_PATH=$links:$home/lib
exec "$@"
