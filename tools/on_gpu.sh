#!/usr/bin/env bash
# What is to be done on the day that there is a GPU, in this order. Needs PyTorch with CUDA, nvcc
# of the same major version, pytest and, for the sanitizer, compute-sanitizer. Results go to
# $OUT, build/on_gpu unless it is set. Each step says in its log whether it passed; the first
# that fails ends the script.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${OUT:-build/on_gpu}
mkdir -p "$out"
python=${PYTHON:-python3}

FORCE_CUDA=1 "$python" setup.py build_ext --inplace 2>&1 | tee "$out/build.log"
nvidia-smi | tee "$out/gpu.txt"
"$python" -m relu_mlp info | tee "$out/info.txt"

"$python" -m pytest -q tests/test_cuda.py 2>&1 | tee "$out/test_cuda.log"
if command -v compute-sanitizer > /dev/null; then
    for tool in memcheck racecheck initcheck; do
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 1 \
            "$python" -m pytest -q tests/test_cuda.py -k "test_exact and 77 and not 4096" \
            2>&1 | tee "$out/$tool.log"
    done
fi
PYTHONPATH=. "$python" benchmarks/on_gpu.py --out "$out"
"$python" -m pytest -q 2>&1 | tee "$out/suite.log"
