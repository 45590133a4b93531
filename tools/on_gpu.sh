#!/usr/bin/env bash
# What is to be done on the day that there is a GPU:
#
#     tools/on_gpu.sh [STEP ...]        build, check, bench, sanitize, suite; all, unless some are named
#
# Needs PyTorch with CUDA, nvcc of the same major version, pytest and, for the sanitizer,
# compute-sanitizer. Logs and results go to $OUT, build/on_gpu unless it is set. But for the build, a
# step that fails keeps no other from running: a GPU may be lent for minutes. The last lines say
# how each step went, and how long it took.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${OUT:-build/on_gpu}
mkdir -p "$out"
python=${PYTHON:-python3}
export PYTHONPATH=. PYTHONUNBUFFERED=1

build() {
    nvidia-smi &&
        FORCE_CUDA=1 "$python" setup.py build_ext --inplace &&
        "$python" -m relu_mlp info
}
check() {
    "$python" -m pytest -q tests/test_cuda.py
}
bench() {
    "$python" benchmarks/on_gpu.py --out "$out"
}
sanitize() {
    local tool failed=0
    for tool in memcheck racecheck initcheck; do
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 1 \
            "$python" -m pytest -q tests/test_cuda.py -k "test_exact and 77 and not 4096" || failed=1
    done
    return "$failed"
}
suite() {
    "$python" -m pytest -q -n auto
}

[ $# -gt 0 ] || set -- build check bench sanitize suite
status=0
: > "$out/report.txt"
for step; do
    started=$SECONDS
    if "$step" 2>&1 | tee "$out/$step.log"; then how=passed; else how=FAILED status=1; fi
    echo "$step: $how, $((SECONDS - started)) s" >> "$out/report.txt"
    if [ "$step $how" = "build FAILED" ]; then break; fi
done
cat "$out/report.txt"
exit "$status"
