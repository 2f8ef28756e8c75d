#!/usr/bin/env bash
# Builds llm.c's CUDA trainer (github.com/karpathy/llm.c) for `make bench-gpu` to compare with, with its own flags:
#
#     dev/bench/llmc_gpu.sh LLMC FOLDER [CUDNN_FRONTEND]
#
# LLMC is a checkout of llm.c, which stays as it is; FOLDER receives
#     train_gpt2cu          with llm.c's own attention
#     train_gpt2cu_cudnn    with cuDNN's, where CUDNN_FRONTEND is given, a checkout of github.com/NVIDIA/cudnn-frontend;
#                           cuDNN itself is that of Python's package nvidia-cudnn-cu13 (or -cu12; PYTHON: which Python)
#
# GPU_ARCH names the GPU where there is none here: GPU_ARCH=sm_90. NVCC: where nvcc is not on the PATH.
set -euo pipefail
if [ $# -lt 2 ] || [ $# -gt 3 ]; then
    sed -n '2,11s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
fail() {
    echo "error: $1" >&2
    exit 1
}

llmc=$(realpath "$1") python=${PYTHON:-python3}
[ -f "$llmc/train_gpt2.cu" ] || fail "$1 is no checkout of llm.c: it has no train_gpt2.cu"
nvcc=${NVCC:-$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)}
[ -x "$nvcc" ] || fail "nvcc was not found: install the CUDA toolkit or say NVCC=/path/to/nvcc"
cuda=$(dirname "$(dirname "$nvcc")")
arch=${GPU_ARCH:-$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1 | tr -d .)} || true
arch=${arch#sm_}
[ -n "$arch" ] || fail "there is no GPU here to ask for its architecture: say GPU_ARCH=sm_90"
mkdir -p "$2"
folder=$(realpath "$2")

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/lib" "$work/cudnn-frontend"
cp -r "$llmc/Makefile" "$llmc/train_gpt2.cu" "$llmc/llmc" "$work"
# Since CUDA 13, cudaMemAdvise() takes a place as a structure.
if "$nvcc" --version | grep -Eq 'release (1[3-9]|[2-9][0-9])\.'; then
    sed -i 's/\(cudaMemAdvise(.*\), cudaCpuDeviceId)/\1, cudaMemLocation{cudaMemLocationTypeHost, 0})/' \
        "$work"/llmc/*.cuh
fi
PATH=$(dirname "$nvcc"):$PATH
export LIBRARY_PATH=$work/lib:$cuda/lib64:$cuda/lib64/stubs${LIBRARY_PATH:+:$LIBRARY_PATH}

# Builds the trainer as $1, linked with the libraries $2; further arguments are make's. Its Makefile's own list of
# libraries is replaced, because it names the driver's, which machines without a GPU lack; without nvml.h llm.c does not
# use it.
build() {
    local name=$1 libraries="-lcublas -lcublasLt $2"
    shift 2
    [ ! -f "$cuda/include/nvml.h" ] || libraries+=" -lnvidia-ml"
    make -C "$work" train_gpt2cu GPU_COMPUTE_CAPABILITY="$arch" NO_MULTI_GPU=1 NO_USE_MPI=1 \
        NVCC_LDFLAGS="$libraries -Xlinker -rpath=$cuda/lib64" "$@"
    mv "$work/train_gpt2cu" "$folder/$name"
    echo "built $folder/$name"
}

build train_gpt2cu ""
[ $# -eq 3 ] || exit 0
frontend=$(realpath "$3")
[ -f "$frontend/include/cudnn_frontend.h" ] ||
    fail "$3 is no checkout of cudnn-frontend: it has no include/cudnn_frontend.h"
cudnn=$("$python" -c 'import nvidia.cudnn as c; print(list(c.__path__)[0])' 2>/dev/null) ||
    fail "$python has no package nvidia-cudnn-cu13: install it, or say PYTHON=python-that-has-it"
ln -s "$frontend/include" "$work/cudnn-frontend/include"
for library in "$cudnn"/lib/libcudnn*.so.*; do
    name=$(basename "$library")
    ln -s "$library" "$work/lib/${name%%.so.*}.so" # what the linker looks for; the package has only libcudnn.so.9
done
export CPATH=$cudnn/include${CPATH:+:$CPATH}
build train_gpt2cu_cudnn "-lcudnn -lnvrtc -lcuda" USE_CUDNN=1 CUDNN_FRONTEND_PATH=cudnn-frontend/include
